"""What all terminal reports are made of: tables without lines, and quantities with the unit that suits them."""

from collections.abc import Iterable, Sequence
from io import StringIO

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

GIB = 2**30
WIDTH = 100
SHOWN_RANKS = 16


def render(*parts: RenderableType, width: int = 110) -> str:
    """The text of these renderables, without colour, at a fixed width."""
    stream = StringIO()
    Console(file=stream, width=width, highlight=False, color_system=None).print(Group(*parts))
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip("\n").splitlines())


def duration(microseconds: float) -> str:
    """A time with the unit that suits it."""
    if microseconds >= 1e6:
        return f"{microseconds / 1e6:.3f} s"
    return f"{microseconds / 1e3:.2f} ms" if microseconds >= 1e3 else f"{microseconds:.0f} µs"


def size(num_bytes: float) -> str:
    """Bytes with the binary unit that suits them."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Names on the left, what is to be said of them on the right."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    return table


def grid(
    title: str,
    columns: Iterable[str],
    rows: Iterable[Sequence[str]],
    *,
    left: Iterable[str] = (),
    folds: Iterable[str] = (),
) -> Group:
    """A titled table; columns are set flush right but for those named in `left`; those in `folds` may break."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    flush_left, may_break = set(left), set(folds)
    for name in columns:
        table.add_column(name, justify="left" if name in flush_left else "right", no_wrap=name not in may_break)
    for row in rows:
        table.add_row(*row)
    return Group(Text(f"\n{title}", style="bold"), table)


def schedule_excerpt(
    lines: Sequence[str], *, title: str, width: int = 106, rest: str = "", ranks: int = SHOWN_RANKS
) -> Group:
    """The start of every rank's line, for the first `ranks`; `rest` says where the rest is, if there is any."""
    shown = []
    for rank, line in enumerate(lines[:ranks]):
        label = f"r{rank}: "
        room = width - len(label)
        shown.append(label + (line if len(line) <= room else line[: line.rfind(" ", 0, room - 2)] + " …"))
    if len(lines) > ranks:
        shown.append(f"… and {len(lines) - ranks} more ranks")
    if rest and (len(lines) > ranks or any(line.endswith(" …") for line in shown)):
        shown.append(rest)
    return Group(Text(f"\n{title}", style="bold"), Text("\n".join(shown)))

"""Processes kept busy beside a measurement: they work, they are told of, and they end with it."""

import os
from pathlib import Path

import pytest

from profiles.errors import ProfileError
from profiles.measure import profile_bundled
from profiles.measure.models import model_spec_for
from profiles.measure.neighbours import NeighbourRequest, neighbours
from profiles.model import Variant

SPEC = model_spec_for("llama", num_layers=2, hidden_size=16, num_heads=2, vocab_size=31, sequence_length=8)


def request(**changes: object) -> NeighbourRequest:
    variant = Variant(micro_batch_size=1, sequence_length=8, dtype="float32")
    return NeighbourRequest(architecture="llama", model=SPEC, variant=variant, num_threads=1).model_copy(update=changes)


def working() -> list[int]:
    """Neighbours that this process has started and that run."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and "profiles.measure.neighbours" in (entry / "cmdline").read_text():
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if int(parent) == os.getpid() and state != "Z":
                    found.append(int(entry.name))
        except OSError:
            continue  # it ended while we looked
    return found


def test_neighbours_work_during_the_block_and_are_gone_after_it_even_after_an_error():
    def fail_beside() -> None:
        with neighbours(2, request()):
            assert len(working()) == 2
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail_beside()
    assert working() == []


def test_a_neighbour_that_cannot_work_is_an_error_and_not_silence():
    with (  # a Llama's shape is not GPT-2's
        pytest.raises(ProfileError, match=r"was to work beside .* ended before it began"),
        neighbours(1, request(architecture="gpt2")),
    ):
        pass
    assert working() == []


def test_a_profile_says_beside_how_many_processes_it_was_measured():
    options = {"micro_batch_sizes": (1,), "repeats": 2, "warmups": 1, "with_links": False}
    alone = profile_bundled("llama", SPEC, **options)
    beside = profile_bundled("llama", SPEC, num_processes=2, **options)
    assert "beside" not in alone.origin.how
    assert beside.origin.how.endswith("beside 1 process doing the same")
    assert beside.variants == alone.variants
    assert working() == []


def test_less_than_one_process_is_a_wrong_argument():
    with pytest.raises(ValueError, match="num_processes is 0"):
        profile_bundled("llama", SPEC, num_processes=0)

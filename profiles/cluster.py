"""What is known about machines: devices, links, and how a cluster is put together."""

from functools import cached_property
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from profiles.facts import Bytes, Count, Dtype, Facts, Fraction, Microseconds, Rate

if TYPE_CHECKING:
    import networkx as nx


MAX_DEVICES = 1_000_000


class Link(Facts):
    """What one device gets out of a link, in one direction, measured or as its vendor prints it."""

    bandwidth_bytes_per_s: Rate
    latency_us: Microseconds
    efficiency: Fraction = 1.0  # share of the bandwidth that large transfers reach
    switched: bool = True  # in a node; if not, devices are joined pairwise, each pair by its part of the bandwidth

    def transfer_us(self, num_bytes: float) -> float:
        """Time of one point-to-point transfer of `num_bytes`, in µs."""
        return self.latency_us + num_bytes / (self.bandwidth_bytes_per_s * self.efficiency) * 1e6

    def all_reduce_us(self, num_bytes: float, degree: int) -> float:
        """Time of a ring all-reduce of `num_bytes` on each of `degree` devices, in µs; 0 for one device.

        2 (n − 1) steps, each one latency and 1/n of the payload.
        """
        return 2 * self.reduce_scatter_us(num_bytes, degree)

    def reduce_scatter_us(self, num_bytes: float, degree: int) -> float:
        """Time of a ring reduce-scatter or all-gather of `num_bytes` in total, in µs; 0 for one device."""
        if degree == 1:
            return 0.0
        return (degree - 1) * self.transfer_us(num_bytes / degree)


class DeviceSpec(Facts):
    """One accelerator (or CPU) as its vendor prints it, and what share of that real kernels reach."""

    name: str
    kind: Literal["cuda", "rocm", "cpu"]
    memory_bytes: Bytes
    memory_bandwidth_bytes_per_s: Rate
    peak_flops: dict[Dtype, Rate] = Field(min_length=1)  # FLOP/s, dense
    matmul_efficiency: Fraction  # best share of the peak that large matrix products reach
    memory_efficiency: Fraction  # share of the bandwidth that elementwise kernels reach
    kernel_launch_us: Microseconds
    num_multiprocessors: Count = 108  # parts that compute one tile of a matrix product each
    scale_up: Link  # to another device of the node
    scale_out: Link  # to a device of another node
    devices_per_node: Count  # in the usual node of this device
    source: str


class NodeGroup(Facts):
    """Nodes of one kind."""

    device: DeviceSpec
    num_nodes: Count
    devices_per_node: Count
    intra_node: Link
    uplink: Link | None = None  # what one device gets out of its node, where it is not the cluster's inter_node

    @property
    def num_devices(self) -> int:
        """Devices in all nodes of this group."""
        return self.num_nodes * self.devices_per_node


class Cluster(Facts):
    """Groups of nodes and the network between them.

    A node is what a device reaches over its fastest links. Where those end inside a host, as with islands of four
    GPUs, an island is the node, the host is the pod, `inter_node` is the link between islands of a host and
    `inter_pod` the network.
    """

    schema_version: Literal["pipewright.cluster/1"] = Field(default="pipewright.cluster/1", alias="schema")
    name: str
    groups: tuple[NodeGroup, ...] = Field(min_length=1)
    inter_node: Link
    nodes_per_pod: Count | None = None
    inter_pod: Link | None = None
    rails: bool = False  # device i of every node hangs on switch i of its pod
    source: str

    @model_validator(mode="after")
    def _pods_have_links(self) -> Self:
        if self.num_devices > MAX_DEVICES:
            raise ValueError(f"{self.num_devices} devices, at most {MAX_DEVICES} can be planned for")
        if (self.nodes_per_pod is None) != (self.inter_pod is None):
            raise ValueError("nodes_per_pod and inter_pod go together: give both or neither")
        return self

    @property
    def num_devices(self) -> int:
        """Devices in the whole cluster."""
        return sum(group.num_devices for group in self.groups)

    @property
    def num_nodes(self) -> int:
        """Nodes in the whole cluster."""
        return sum(group.num_nodes for group in self.groups)

    @cached_property
    def node_of_device(self) -> tuple[int, ...]:
        """Node index of every device index, shape (num_devices,); devices are numbered node by node."""
        sizes = [group.devices_per_node for group in self.groups for _ in range(group.num_nodes)]
        return tuple(node for node, size in enumerate(sizes) for _ in range(size))

    @cached_property
    def group_index_of_node(self) -> tuple[int, ...]:
        """Index into `groups` of every node, shape (num_nodes,)."""
        return tuple(index for index, group in enumerate(self.groups) for _ in range(group.num_nodes))

    def group_of_node(self, node: int) -> NodeGroup:
        """The group that holds node `node` (from 0)."""
        if not 0 <= node < self.num_nodes:
            raise IndexError(f"cluster {self.name!r} has {self.num_nodes} nodes")
        return self.groups[self.group_index_of_node[node]]

    def uplink_of_node(self, node: int) -> Link:
        """What one device of this node gets to a node of the same pod."""
        return self.group_of_node(node).uplink or self.inter_node

    def pod_of_node(self, node: int) -> int:
        """The pod of a node; 0 where there are no pods."""
        return 0 if self.nodes_per_pod is None else node // self.nodes_per_pod

    @cached_property
    def narrowest_uplink(self) -> Link:
        """The slowest of all links out of nodes: the pace of a collective that crosses every node."""
        return _narrowest([group.uplink or self.inter_node for group in self.groups])

    def link_between(self, device_a: int, device_b: int) -> Link:
        """The narrowest link on the way between two devices."""
        node_a, node_b = self.node_of_device[device_a], self.node_of_device[device_b]
        on_the_way = [self.group_of_node(node).intra_node for node in (node_a, node_b)]
        if node_a != node_b:
            on_the_way += [self.uplink_of_node(node) for node in (node_a, node_b)]
            if self.inter_pod is not None and self.pod_of_node(node_a) != self.pod_of_node(node_b):
                on_the_way.append(self.inter_pod)
        return _narrowest(on_the_way)

    def graph(self) -> "nx.Graph[tuple[str, int]]":
        """Devices, nodes, rails and pods with a `link` on every edge; a tree where there are no rails.

        Vertices are ("device", i), ("node", n), ("rail", r), ("pod", k) and ("cluster", 0); the link of an edge is
        what one device gets when its traffic takes that edge. Devices and nodes carry `group`, their index into
        `groups`, and devices carry `device`, its name. A rail is a switch: number r = pod · w + i joins devices i of
        the pod's nodes, where w is the most devices of any node, and stands between the nodes and the pod.
        """
        import networkx as nx  # slow to load, and most callers ask for no graph

        graph: nx.Graph[tuple[str, int]] = nx.Graph(name=self.name)
        for node, index in enumerate(self.group_index_of_node):
            graph.add_node(("node", node), group=index)
        trunk = max((group.uplink or self.inter_node for group in self.groups), key=_achieved)
        widest = max(group.devices_per_node for group in self.groups)
        place, last = 0, -1
        for device, node in enumerate(self.node_of_device):
            place, last = (place + 1 if node == last else 0), node
            index, pod = self.group_index_of_node[node], self.pod_of_node(node)
            group = self.groups[index]
            graph.add_node(("device", device), group=index, device=group.device.name)
            graph.add_edge(("device", device), ("node", node), link=group.intra_node)
            if self.rails:
                rail = ("rail", pod * widest + place)
                graph.add_edge(("device", device), rail, link=self.uplink_of_node(node))
                graph.add_edge(rail, ("pod", pod), link=trunk)
        for node in range(self.num_nodes):
            if not self.rails:
                graph.add_edge(("node", node), ("pod", self.pod_of_node(node)), link=self.uplink_of_node(node))
            graph.add_edge(("pod", self.pod_of_node(node)), ("cluster", 0), link=self.inter_pod or self.inter_node)
        return graph


def _narrowest(links: list[Link]) -> Link:
    return min(links, key=_achieved)


def _achieved(link: Link) -> float:
    return link.bandwidth_bytes_per_s * link.efficiency

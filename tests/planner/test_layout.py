"""Where tensors lie in their shards."""

from planner.expr import DType, Read, SourceFile
from planner.graph import TensorGraph
from planner.layout import PAGE
from planner.schedule import compile

FILES = [SourceFile(1, inode, 1 << 40, 0, f"/models/{inode}") for inode in range(3)]


def test_a_shard_s_large_tensors_lie_modulo_a_page_where_they_lie_in_their_source() -> None:
    graph = TensorGraph()
    graph.add("small", Read(FILES[0], 100, DType.F32, (3,)))
    graph.add("large", Read(FILES[0], 3 * PAGE + 1232, DType.F32, (PAGE,)))
    (shard,) = compile(graph, budget_nbytes=8 << 20, shard_nbytes=1 << 40).shards
    assert [tensor.name for tensor in shard.tensors] == ["large", "small"]
    assert shard.tensors[0].offset % PAGE == 1232

"""Where nodes stand in the picture of a graph."""

from __future__ import annotations

from converter.report.layout import placed


def test_a_node_stands_below_all_that_it_reads():
    edges = [("a", "b"), ("b", "c"), ("a", "c"), ("c", "d")]
    found = placed(["a", "b", "c", "d"], edges)
    assert {name: row for name, (_, row) in found.items()} == {"a": 0, "b": 1, "c": 2, "d": 3}
    assert all(found[start][1] < found[end][1] for start, end in edges)


def test_branches_stand_side_by_side_without_crossing():
    # Two chains from one node; the second row is given the wrong way round.
    edges = [("in", "a"), ("in", "b"), ("b", "b2"), ("a", "a2"), ("a2", "out"), ("b2", "out")]
    found = placed(["in", "a", "b", "b2", "a2", "out"], edges)
    columns = {name: column for name, (column, _) in found.items()}
    assert columns["in"] == columns["out"] == 0
    assert (columns["a"] < columns["b"]) == (columns["a2"] < columns["b2"])
    assert {columns["a"], columns["b"]} == {-0.5, 0.5}


def test_no_two_nodes_share_a_place_in_a_graph_of_a_thousand():
    names = [f"n{i}" for i in range(1000)]
    edges = [(names[i // 3], names[i]) for i in range(1, 1000)]
    found = placed(names, [*edges, ("unknown", "n1")])
    assert len(set(found.values())) == 1000

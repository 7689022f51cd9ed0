"""Where the nodes of a graph stand in a picture of it: rows from top to bottom, as data flows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

Edge = tuple[str, str]
# Times that rows are put in the order of their neighbours, downwards and upwards.
SWEEPS = 4


def placed(names: Sequence[str], edges: Iterable[Edge]) -> dict[str, tuple[float, int]]:
    """Column and row of every node; `names` are in the order of the computation.

    A node's row is behind those of all it reads. In a row nodes stand in the order of the mean
    column of their neighbours (the barycentre method of Sugiyama et al., IEEE SMC 11, 1981), with
    the row in the middle at 0.
    """
    known = dict.fromkeys(names)
    pairs = [(start, end) for start, end in edges if start in known and end in known]
    before, behind = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for start, end in pairs:
        before[end].append(start)
        behind[start].append(end)
    rows = dict[str, int]()
    for name in names:
        rows[name] = 1 + max((rows.get(maker, -1) for maker in before[name]), default=-1)
    ranks = defaultdict[int, list[str]](list)
    for name, row in rows.items():
        ranks[row].append(name)
    columns = {name: place for rank in ranks.values() for name, place in _spread(rank).items()}
    for sweep in range(SWEEPS):
        neighbours = behind if sweep % 2 else before
        for row in sorted(ranks, reverse=bool(sweep % 2)):
            ranks[row].sort(key=lambda name: _mean(name, neighbours, columns))
            columns |= _spread(ranks[row])
    return {name: (columns[name], rows[name]) for name in names}


def _spread(rank: Sequence[str]) -> dict[str, float]:
    return {name: place - (len(rank) - 1) / 2 for place, name in enumerate(rank)}


def _mean(
    name: str, neighbours: Mapping[str, Sequence[str]], columns: Mapping[str, float]
) -> float:
    found = [columns[other] for other in neighbours.get(name, ())]
    return sum(found) / len(found) if found else columns[name]

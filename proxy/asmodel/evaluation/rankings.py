"""How good a ranking is: an answer's order of ids against those that are relevant, each as relevant as the others.

Definitions as in Manning, Raghavan and Schütze, "Introduction to Information Retrieval" (2008), chapter 8; nDCG with
binary gains and the logarithm of base 2 (Järvelin and Kekäläinen 2002). `k` of None is the whole ranking.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias, cast

from asmodel.calls import JSON
from asmodel.evaluation.fields import Field, NoSuchField
from asmodel.programs import Answer

Measure: TypeAlias = Callable[[Sequence[str], Collection[str], int | None], float]


def recall(ranking: Sequence[str], relevant: Collection[str], k: int | None) -> float:
    """How many of the relevant are among the first k."""
    return len(set(ranking[:k]) & set(relevant)) / len(set(relevant))


def precision(ranking: Sequence[str], relevant: Collection[str], k: int | None) -> float:
    """How many of the first k are relevant; of k even where the ranking is shorter."""
    return len(set(ranking[:k]) & set(relevant)) / (k or max(1, len(ranking)))


def hit(ranking: Sequence[str], relevant: Collection[str], k: int | None) -> float:
    """1 where any of the first k is relevant: top-k accuracy."""
    return float(not set(ranking[:k]).isdisjoint(relevant))


def reciprocal_rank(ranking: Sequence[str], relevant: Collection[str], k: int | None) -> float:
    """1 through the place of the first relevant one; 0 where there is none."""
    return next((1 / place for place, id in enumerate(ranking[:k], 1) if id in relevant), 0.0)


def ndcg(ranking: Sequence[str], relevant: Collection[str], k: int | None) -> float:
    """Discounted cumulative gain, as a share of the best that there could be."""
    wanted = set(relevant)
    gain = math.fsum(1 / math.log2(place + 1) for place, id in enumerate(_once(ranking[:k]), 1) if id in wanted)
    best = math.fsum(1 / math.log2(place + 1) for place in range(1, min(len(wanted), k or len(wanted)) + 1))
    return gain / best


MEASURES: Mapping[str, Measure] = {
    "recall": recall,
    "precision": precision,
    "hit": hit,
    "mrr": reciprocal_rank,
    "ndcg": ndcg,
}


def _once(ranking: Sequence[str]) -> list[str]:
    """Each id where it comes first. A second place of it gains nothing, and is taken all the same."""
    first = {id: place for place, id in reversed(list(enumerate(ranking)))}
    return [id if first[id] == place else "" for place, id in enumerate(ranking)]


def ranking_of(answer: Answer, place: Field | None) -> list[str]:
    """The ids of an answer's ranking, the best first. Raises ValueError where there is none.

    It is what stands at `place` in the answer's `data`; without one, `data` itself or its `ranking`; without data, the
    citations in their order. An element is an id, or an object with an `id`.
    """
    data: JSON = answer.data
    if place is not None:
        try:
            data = place.of(cast("Any", data) if isinstance(data, Mapping) else {})
        except NoSuchField as error:
            raise ValueError(f"the answer's data: {error}") from None
    elif isinstance(data, Mapping) and "ranking" in data:
        data = cast("Any", data)["ranking"]
    elif data is None and answer.citations:
        return [citation.id for citation in answer.citations]
    if isinstance(data, (list, tuple)):
        return [_id(item) for item in cast("Sequence[Any]", data)]
    raise ValueError(
        "the answer holds no ranking: a program gives one as Answer(data=[ids, the best first]), as data with "
        '"ranking" in it, or by its citations'
    )


def relevant_of(reference: JSON) -> list[str]:
    """The relevant ids of a line. Raises ValueError where there are none."""
    items: Sequence[Any] = cast("Any", reference) if isinstance(reference, (list, tuple)) else [reference]
    if not items:
        raise ValueError("there is no relevant id")
    return [_id(item) for item in items]


def _id(item: Any) -> str:
    if isinstance(item, Mapping) and "id" in item:
        item = cast("Mapping[str, Any]", item)["id"]
    if isinstance(item, bool) or not isinstance(item, (str, int)):
        raise ValueError('an id is text or a whole number, or an object with "id"')
    return str(item)

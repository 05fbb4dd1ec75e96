"""Answer a question from paragraphs: show the model only those that matter, and search for a chain of thoughts.

Source: Schlag, Sukhbaatar, Celikyilmaz, Yih, Weston, Schmidhuber, Li, "Large Language Model Programs", arXiv 2305.05364
(2023). `relevance_by_likelihood` and `best` are its Algorithm 1, `tree_search` is its Algorithm 2. It prints no
prompts, so the words here are ours; and what it leaves open is a parameter: how many paragraphs are kept, how deep and
far the search goes, how one answer is chosen of several chains. What ranks is how likely the model finds a text, which
it could hardly be asked (Table 1 there). Upstreams that do not report that of given text have `ranking="first-token"`,
`"listwise"` (after Sun et al., arXiv 2304.09542, 2023) and `search="generated"`; none is taken unless it is named.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from asmodel import (
    Answer,
    Citation,
    Document,
    InvalidRequest,
    Prompt,
    Reply,
    Run,
    Step,
    StepError,
    gather,
    program,
    score,
    step,
)


class FilterParams(BaseModel):
    paragraphs: list[str] = Field(default=[], description="The paragraphs; or send documents with the conversation.")
    corpus: str = Field(default="", description="A corpus of the settings ([tools.NAME]), to be searched for more.")
    found: int = Field(default=100, ge=1, le=1000, description="How many paragraphs the search of the corpus gives.")
    prefilter: int | None = Field(default=None, ge=1, description="Rank only so many: the best by BM25. None: all.")
    ranking: Literal["likelihood", "first-token", "listwise", "bm25"] = Field(
        default="likelihood",
        description="likelihood: of the question after each paragraph, as published. first-token: of the model's Yes "
        "against its No, asked of each paragraph. listwise: the order in which it names the paragraphs it is shown. "
        "bm25: by words alone, with no model, to compare with.",
    )
    keep: int | None = Field(
        default=None, ge=1, description="How many of the best are kept. None: 1, or with `gain` all that reach it."
    )
    gain: float | None = Field(
        default=None,
        description="Keep only what makes the question likelier than no paragraph does, by more nats a token.",
    )

    @model_validator(mode="after")
    def _gain_is_of_likelihood(self) -> "FilterParams":
        if self.gain is not None and self.ranking != "likelihood":
            raise ValueError('`gain` compares likelihoods, so it wants ranking="likelihood"')
        return self


class EvidenceParams(FilterParams):
    search: Literal["none", "nll", "delta", "generated"] = Field(
        default="none",
        description="none: read the answer from what is kept at once. nll, delta: search over chains of thoughts, "
        "ranked as published. generated: as nll, by the log-probabilities that the writer reports of its own words.",
    )
    answers: Literal["open", "yes-no"] = Field(default="open", description="What the search looks for.")
    complete: int = Field(default=3, ge=0, description="The search ends with more than so many complete chains.")
    depth: int = Field(default=5, ge=1, le=50, description="Thoughts in a chain, after which its answer is forced.")
    expansions: int = Field(
        default=16, ge=1, description="Chains that are grown at most; then the best ones' answers are forced."
    )
    choice: Literal["vote", "best"] = Field(
        default="vote",
        description="vote: the answer of most complete chains, the best-ranked chain's among equals. best: that of the "
        "best-ranked chain.",
    )


# Part A: which paragraphs matter


@score(model="scorer")
def question_given(paragraph: str, question: str) -> tuple[str, str]:
    return f"{paragraph}\n\nQ:" if paragraph else "Q:", f" {question}"  # shown, then measured


@step(model="judge", temperature=0, max_tokens=1, logprobs=20, returns=Reply)
def helps(paragraph: str, question: str) -> str:
    return f"{paragraph}\n\nDoes this passage help to answer the question below? Say Yes or No.\nQuestion: {question}"


def numbers_in(text: str) -> list[int]:
    """The numbers in the text, each once, in their order."""
    found = list(dict.fromkeys(map(int, re.findall(r"\d{1,9}", text))))
    if not found:
        raise ValueError("The reply should be numbers of passages, the most helpful first, such as 2, 3, 1.")
    return found


@step(model="judge", temperature=0, max_tokens=64, returns=numbers_in)
def most_helpful(paragraphs: Sequence[str], question: str) -> str:
    passages = "\n\n".join(f"[{number}] {paragraph}" for number, paragraph in enumerate(paragraphs, 1))
    return (
        f"{passages}\n\nQuestion: {question}\nWhich of these passages help to answer it? Give their numbers, the most "
        "helpful first, and nothing else."
    )


async def relevance_by_likelihood(run: Run[Any], paragraphs: Sequence[str]) -> list[float]:
    """Algorithm 1: for each paragraph, the average log-likelihood of the question's tokens after it."""
    with run.part("filter", of=len(paragraphs)):
        likelihoods = await gather(run(question_given, paragraph, run.question) for paragraph in paragraphs)
    return [likelihood.mean for likelihood in likelihoods]


async def relevance_by_first_token(run: Run[Any], paragraphs: Sequence[str]) -> list[float]:
    """For each paragraph, the log of how likely the model's first token is a Yes, less that of a No."""
    with run.part("filter", of=len(paragraphs)):
        replies = await gather(run(helps, paragraph, run.question) for paragraph in paragraphs)
    return [yes_over_no("helps", reply) for reply in replies]


async def relevance_by_list(run: Run[Any], paragraphs: Sequence[str], window: int = 10) -> list[float]:
    """The place in a list that the model has put in order: of ten at a time, from the end, five of them again."""
    order = list(range(len(paragraphs)))
    for start in range(max(0, len(order) - window), -window // 2, -window // 2):
        part = order[max(0, start) : max(0, start) + window]
        named = await run(most_helpful, [paragraphs[i] for i in part], run.question)
        first = [part[number - 1] for number in named if 1 <= number <= len(part)]
        order[max(0, start) : max(0, start) + window] = [*first, *(i for i in part if i not in first)]
    return [-float(order.index(i)) for i in range(len(paragraphs))]


async def best(run: Run[Any], params: FilterParams, paragraphs: Sequence[str], keep: int | None) -> list[int]:
    """The places of the paragraphs that are kept, the best first."""
    places = list(range(len(paragraphs)))
    if params.prefilter is not None and params.prefilter < len(places):
        words = bm25(run.question, paragraphs)
        places = sorted(places, key=lambda i: -words[i])[: params.prefilter]
    texts = [paragraphs[i] for i in places]
    if params.ranking == "bm25":
        values = bm25(run.question, texts)
    elif params.ranking == "likelihood":
        values = await relevance_by_likelihood(run, texts)
    elif params.ranking == "first-token":
        values = await relevance_by_first_token(run, texts)
    else:
        values = await relevance_by_list(run, texts)
    relevance = dict(zip(places, values, strict=True))
    if params.gain is not None:
        least = (await run(question_given, "", run.question)).mean + params.gain
        places = [i for i in places if relevance[i] > least]
    return sorted(places, key=lambda i: -relevance[i])[:keep]


# Part B: the search for a chain of thoughts


@dataclass(frozen=True, slots=True)
class Thought:
    """One step of a chain: what was thought, over which paragraph, and what the rankings need to know of it."""

    text: str
    paragraph: int
    total: float
    """log p(S | Q, P): S this thought, Q the question and the thoughts before it, P the paragraph."""
    tokens: int
    delta: float = 0.0
    """Delta_P + Delta_Q, in nats a token."""


@dataclass(frozen=True, slots=True)
class Chain:
    """The question, and what has been thought about it."""

    thoughts: tuple[Thought, ...] = ()
    answer: str = ""

    @property
    def texts(self) -> list[str]:
        return [thought.text for thought in self.thoughts]

    def rank(self, search: str) -> float:
        """The least is the best: the average Delta_P + Delta_Q of its thoughts, or its average NLL in nats a token."""
        if search == "delta":
            return sum(t.delta for t in self.thoughts) / max(1, len(self.thoughts))
        return -sum(t.total for t in self.thoughts) / max(1, sum(t.tokens for t in self.thoughts))


EXAMPLES = """Passage: Camel: A camel stores fat in its humps and can go a week without drinking.
Question: Could a camel cross a desert in three days without water?
Step: A camel can go a week without drinking, which is longer than three days.
Step: So the answer is yes.

Passage: Harbour seal: Harbour seals dive for about five minutes and then come up to breathe.
Question: Can a harbour seal sleep under water for eight hours without surfacing?
Step: A harbour seal has to come up to breathe after about five minutes.
Step: So the answer is no."""


@step(model="writer", temperature=0, max_tokens=64, stop="\n", returns=Reply)
def next_thought(paragraph: str, question: str, thoughts: Sequence[str]) -> Prompt:
    steps = "".join(f"Step: {thought}\n" for thought in thoughts)
    return Prompt(f"{EXAMPLES}\n\nPassage: {paragraph}\nQuestion: {question}\n{steps}Step:")


@step(model="writer", temperature=0, max_tokens=64, stop="\n", logprobs=1, returns=Reply)
def next_thought_in_chat(paragraph: str, question: str, thoughts: Sequence[str]) -> str:
    return f"Give the next step alone, as in the examples.\n\n{next_thought(paragraph, question, thoughts).text}"


@score(model="scorer")
def thought_given(paragraph: str, question: str, thoughts: Sequence[str], thought: str) -> tuple[str, str]:
    asked = f"Q: {question}\nA:{''.join(f' {t}' for t in thoughts)}" if question else "A:"
    return f"{paragraph}\n\n{asked}" if paragraph else asked, f" {thought}"


@score(model="scorer")
def answer_given(question: str, thoughts: Sequence[str], answer: str) -> tuple[str, str]:
    return f"Q: {question}\nA:{''.join(f' {t}' for t in thoughts)} So the answer is", f" {answer}."


@step(model="writer", temperature=0, max_tokens=1, logprobs=20, returns=Reply)
def verdict(question: str, thoughts: Sequence[str]) -> str:
    return f"Question: {question}\n{' '.join(thoughts)}\nSo is the answer yes or no? Say Yes or No."


@step(model="writer", temperature=0, max_tokens=32, stop="\n")
def conclusion(question: str, thoughts: Sequence[str]) -> str:
    return f"Question: {question}\n{' '.join(thoughts)}\nSo, in a few words, what is the answer?"


def answer_in(thought: str, answers: str) -> str:
    """The answer that a thought gives, such as the no of “Thus, the answer is no.”; empty where it gives none."""
    wanted = r"\W*(yes|no)\b" if answers == "yes-no" else r"[:\s]*(\S.*?)[\s.]*$"
    found = re.search(r"\banswer\b[^.?!]{0,60}?\bis" + wanted, thought, re.IGNORECASE)
    return found[1].lower() if found and answers == "yes-no" else found[1] if found else ""


async def add_step(run: Run[EvidenceParams], chain: Chain, place: int, paragraph: str) -> Chain | None:
    """The chain with one more thought, had with this one paragraph in view; None where the model has no new one."""
    question, before, delta = run.question, chain.texts, 0.0
    generated = run.params.search == "generated"
    reply = await run(next_thought_in_chat if generated else next_thought, paragraph, question, before)
    thought = reply.text.strip()
    if not thought or thought in before:
        return None
    if generated:
        given = reported("next_thought_in_chat", reply).likelihood
    else:
        given = await run(thought_given, paragraph, question, before, thought)  # p(S | Q, P)
    if run.params.search == "delta":
        without_paragraph, without_question = await gather(
            run(thought_given, "", question, before, thought),  # p(S | Q)
            run(thought_given, paragraph, "", [], thought),  # p(S | P)
        )
        delta = (without_paragraph.mean - given.mean) + (without_question.mean - given.mean)
    new = Thought(thought, place, given.total, given.tokens, delta)
    return Chain((*chain.thoughts, new), answer_in(thought, run.params.answers))


async def forced(run: Run[EvidenceParams], chain: Chain) -> Chain:
    """The chain with an answer, where it has come to none: the likelier of yes and no, or what the model concludes."""
    if run.params.answers == "open":
        return replace(chain, answer=(await run(conclusion, run.question, chain.texts)).strip())
    if run.params.search == "generated":
        more = yes_over_no("verdict", await run(verdict, run.question, chain.texts))
    else:
        yes, no = await gather(run(answer_given, run.question, chain.texts, answer) for answer in ("yes", "no"))
        more = yes.mean - no.mean
    return replace(chain, answer="yes" if more > 0 else "no")


async def tree_search(run: Run[EvidenceParams], evidence: Sequence[Document]) -> Answer:
    """Algorithm 2: grow the best chain by a thought over each paragraph, until more than k chains are complete."""
    params = run.params
    chains, complete, grown = [Chain()], list[Chain](), 0
    while chains and len(complete) <= params.complete:
        chain = min(chains, key=lambda c: c.rank(params.search))
        chains.remove(chain)
        if len(chain.thoughts) >= params.depth or grown >= params.expansions:
            complete.append(await forced(run, chain))
        else:
            grown += 1
            with run.part(f"thought {len(chain.thoughts) + 1}", of=len(evidence)):
                longer = await gather(add_step(run, chain, place, p.text) for place, p in enumerate(evidence))
            for c in filter(None, longer):
                (complete if c.answer else chains).append(c)
        if complete:
            run.best(chosen(params, complete, evidence))  # if a limit ends the run here
    run.note(expansions=grown, complete=len(complete))
    return chosen(params, complete or [await forced(run, Chain())], evidence)


def chosen(params: EvidenceParams, complete: Sequence[Chain], evidence: Sequence[Document]) -> Answer:
    """One answer of several complete chains, with the chain that it is taken from and the paragraphs that it used."""
    ranked = sorted(complete, key=lambda c: c.rank(params.search))
    votes = Counter(same(c.answer) for c in ranked)  # of equal counts, the one that was counted first comes first
    winner = same(ranked[0].answer) if params.choice == "best" else votes.most_common(1)[0][0]
    chain = next(c for c in ranked if same(c.answer) == winner)
    used = dict.fromkeys(thought.paragraph for thought in chain.thoughts)
    return Answer(
        text=chain.answer.capitalize() if params.answers == "yes-no" else chain.answer,
        citations=[cited(evidence[place]) for place in used],
        data={"thoughts": chain.texts, "rank": chain.rank(params.search), "votes": dict(votes.most_common())},
    )


# What both parts lean on


def bm25(question: str, paragraphs: Sequence[str], k1: float = 1.2, b: float = 0.75) -> list[float]:
    """How well the question's words match each paragraph's: Okapi BM25, with the usual k1 and b."""
    texts = [Counter(re.findall(r"\w+", text.lower())) for text in paragraphs]
    mean = sum(text.total() for text in texts) / max(1, len(texts))
    within = Counter(word for text in texts for word in text)
    wanted = {
        word: math.log(1 + (len(texts) - within[word] + 0.5) / (within[word] + 0.5))
        for word in re.findall(r"\w+", question.lower())
    }
    return [
        sum(
            idf * text[word] * (k1 + 1) / (text[word] + k1 * (1 - b + b * text.total() / mean))
            for word, idf in wanted.items()
            if text[word]
        )
        for text in texts
    ]


def reported(name: str, reply: Reply) -> Reply:
    """The reply, which has log-probabilities. Raises StepError where it has none."""
    if not reply.logprobs:
        raise StepError(
            f'step "{name}": the upstream reports no log-probabilities of what it says, and is ranked by them'
        )
    return reply


def yes_over_no(name: str, reply: Reply) -> float:
    """log p(Yes) - log p(No) of a reply's first token; what is not among the likeliest counts as the last of them."""
    likely = reported(name, reply).logprobs[0].top or ((reply.logprobs[0].token, reply.logprobs[0].logprob),)
    least = min(logprob for _, logprob in likely)
    mass = {
        word: [math.exp(logprob) for token, logprob in likely if token.strip().lower() == word]
        for word in ("yes", "no")
    }
    yes, no = (math.log(sum(found)) if found else least for found in mass.values())
    return yes - no


def same(answer: str) -> str:
    """Answers that differ only in case, articles and punctuation are one answer."""
    words = re.sub(r"[^\w\s]", "", answer.lower()).split()
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)


def cited(document: Document) -> Citation:
    return Citation(id=document.id or document.title, text=document.text)


async def documents_of(run: Run[Any], params: FilterParams) -> list[Document]:
    """The paragraphs of the parameters, the documents of the conversation and what the corpus has, each with an id."""
    documents = [Document(text=text, id=str(number)) for number, text in enumerate(params.paragraphs, 1)]
    documents += [
        d if d.id or d.title else replace(d, id=str(n)) for n, d in enumerate(run.documents, len(documents) + 1)
    ]
    if params.corpus and run.question:
        passages = await run(run.tool(params.corpus), query=run.question, n=params.found)
        documents += [Document(text=p["text"], title=p["title"], id=p["id"]) for p in passages]
        if not documents:
            return []
    if not documents or not run.question:
        raise InvalidRequest(
            f'program "{run.program.name}" wants a question, and paragraphs to answer it from: '
            '"asmodel": {"params": {"paragraphs": ["…", "…"]}}, or "documents": [{"text": "…"}]',
            param="asmodel.params.paragraphs",
        )
    return documents


# The programs


@step(model="writer", temperature=0, max_tokens=40, stop="\n")
def answer_from(evidence: Sequence[str], question: str) -> str:
    passages = "\n\n".join(evidence)
    return f"{passages}\n\nUsing the passage above, answer in a few words.\nQuestion: {question}"


def steps_of(params: FilterParams) -> list[Step[..., Any, Any]]:
    """The steps that these parameters lead to, for whose sake an upstream has to be able to do something."""
    rankings: dict[str, Step[..., Any, Any]] = {"first-token": helps, "listwise": most_helpful}
    used = [] if params.ranking == "bm25" else [rankings.get(params.ranking, question_given)]
    if isinstance(params, EvidenceParams):
        if params.search == "none":
            return [*used, answer_from]
        used += [next_thought_in_chat, verdict] if params.search == "generated" else [next_thought, thought_given]
        used += [conclusion] if params.answers == "open" else [] if params.search == "generated" else [answer_given]
    return used


@program("evidence-qa", params=EvidenceParams, uses=steps_of)
async def evidence_qa(run: Run[EvidenceParams]) -> Answer:
    """Answer from the paragraphs that make the question most likely, and cite them."""
    params = run.params
    documents = await documents_of(run, params)
    keep = 1 if params.keep is None and params.gain is None else params.keep
    evidence = [documents[i] for i in await best(run, params, [d.text for d in documents], keep)]
    run.note(kept=len(evidence))
    if not evidence:
        none = "None of the paragraphs makes the question likelier than no paragraph does."
        return Answer(text=none if documents else "The corpus has no passage with a word of the question.")
    if params.search != "none":
        return await tree_search(run, evidence)
    text = await run.reply(answer_from, [d.text for d in evidence], run.question)
    return Answer(text=text, citations=[cited(d) for d in evidence])


@program("evidence-filter", params=FilterParams, uses=steps_of)
async def evidence_filter(run: Run[FilterParams]) -> Answer:
    """Rank the paragraphs by how likely they make the question, and answer nothing: the filter of evidence-qa alone."""
    documents = await documents_of(run, run.params)
    places = await best(run, run.params, [d.text for d in documents], run.params.keep)
    kept = [cited(documents[i]) for i in places]
    return Answer(text="\n".join(citation.id for citation in kept), citations=kept)

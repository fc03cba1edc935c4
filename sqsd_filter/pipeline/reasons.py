"""Why a row is risky, in words: where its risk stands, the layers and the words that carry it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqsd_filter.scoring.explain import Explanation, RiskPart

MOST_OF = 0.5  # the share of the risk that the named layers carry
LONGEST = 5  # words of a phrase
LEAST = 0.2  # of the riskiest phrase's part: phrases with less are not named
PUNCTUATION = ".,:;!?\"'()[]“”…"


def words_of(explanation: Explanation) -> list[tuple[str, float]]:
    """The words of the answers with their parts of the risk, which are the sums of those of their tokens. Together they
    are the text of the tokens, white space included."""
    words: list[tuple[str, float]] = []
    for token in explanation["tokens"]:
        text = token["text"]
        begins = not words or text[:1].isspace() or (text and words[-1][0][-1:].isspace()) or text.startswith("<|")
        if begins:
            words.append((text, token["risk"]))
        else:
            words[-1] = (words[-1][0] + text, words[-1][1] + token["risk"])
    return words


def riskiest_phrases(explanation: Explanation, count: int) -> list[tuple[str, float]]:
    """The phrases of at most `LONGEST` words that add most to the risk, the riskiest first. A phrase has no punctuation
    inside, none of its words is in another one, and markers of the chat template are left out."""
    words = words_of(explanation)
    runs = [
        range(start, start + size)
        for start in range(len(words))
        for size in range(1, min(LONGEST, len(words) - start) + 1)
        if all(_goes_on(words[k][0], words[k + 1][0]) for k in range(start, start + size - 1))
    ]
    sums = {run: sum(words[k][1] for k in run) for run in runs}
    phrases: list[tuple[str, float]] = []
    taken: set[int] = set()
    for run in sorted((run for run in runs if sums[run] > 0), key=lambda run: -sums[run]):
        text = "".join(words[k][0] for k in run).strip().strip(PUNCTUATION)
        least = LEAST * phrases[0][1] if phrases else 0.0
        if taken.isdisjoint(run) and text and not text.startswith("<|") and sums[run] >= least and len(phrases) < count:
            phrases.append((text, sums[run]))
            taken.update(run)
    return phrases


def _goes_on(word: str, following: str) -> bool:
    """Do two words belong to one phrase?"""
    return word[-1:] not in PUNCTUATION and "\n" not in word + following and not following.startswith("<|")


def layers_in_words(explanation: Explanation) -> str:
    """Where the risk arises, as a clause; nothing where no layers stand out. The layers are sorted by their parts."""
    parts = {each["layer"]: each for each in explanation["layers"] if each["layer"] is not None}
    if (bias := explanation.get("bias")) is not None:
        added = (
            f"the prompt adds {explanation['prompt']['risk']:+.2f} and the answer {explanation['answer']['risk']:+.2f}"
        )
        return f"{added} to the {bias:.2f} of every row, most of it read at layer {next(iter(parts))}"
    layers = sorted(parts)
    total = sum(part["risk"] for part in parts.values())
    if total <= 0 or not layers:
        return ""
    run = _shortest_run([parts[layer]["risk"] for layer in layers], MOST_OF * total)
    named = [layers[k] for k in run]
    where = f"layer {named[0]}" if len(named) == 1 else f"layers {named[0]} to {named[-1]}"
    share = sum(parts[layer]["risk"] for layer in named) / total
    much = f"{100 * share:.0f} %" if share <= 1 else "most"  # other layers may take some away
    return f"{much} of its risk arises in {where} ({_by_probe([parts[layer] for layer in named])})"


def _shortest_run(values: Sequence[float], least: float) -> range:
    """The shortest run of values with this sum, the largest of equally short ones; all of them where there is none."""
    for size in range(1, len(values)):
        start = max(range(len(values) - size + 1), key=lambda k: sum(values[k : k + size]))
        if sum(values[start : start + size]) >= least:
            return range(start, start + size)
    return range(len(values))


def _by_probe(parts: Sequence[RiskPart]) -> str:
    sums = {name: sum(part["probes"][name] for part in parts) for name in parts[0]["probes"]}
    return ", ".join(f"{name} {value:+.2f}" for name, value in sorted(sums.items(), key=lambda each: -each[1]))


def probes_in_words(probes: Mapping[str, float], weights: Mapping[str, float]) -> str:
    """What each probe adds to the risk, the most first; nothing where the risk is a single probe."""
    if len(probes) < 2 or set(probes) != set(weights):
        return ""
    parts = sorted(((name, weights[name] * value) for name, value in probes.items()), key=lambda each: -each[1])
    return "its risk adds up from " + ", ".join(f"{name} {value:+.2f}" for name, value in parts)

"""Why a row is risky, in words: where its risk stands, the layers and the words that carry it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqsd_filter.scoring.explain import Explanation, RiskPart

MOST_OF = 0.5  # the share of the risk that the named layers carry


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


def riskiest_words(explanation: Explanation, count: int) -> list[tuple[str, float]]:
    """The words that add most to the risk, without the white space around them; the riskiest first."""
    adding = [(word.strip(), risk) for word, risk in words_of(explanation) if word.strip() and risk > 0]
    return sorted(adding, key=lambda word: -word[1])[:count]


def layers_in_words(explanation: Explanation) -> str:
    """Where the risk arises, as a clause; nothing where no layers stand out."""
    parts = {each["layer"]: each for each in explanation["layers"] if each["layer"] is not None}
    if "bias" in explanation:
        read = [f"layer {layer} {part['risk']:+.2f}" for layer, part in parts.items() if part["risk"] > 0]
        return f"read from the hidden states of {', '.join(read)}" if read else ""
    layers = sorted(parts)
    total = sum(part["risk"] for part in parts.values())
    if total <= 0 or not layers:
        return ""
    run = _shortest_run([parts[layer]["risk"] for layer in layers], MOST_OF * total)
    named = [layers[k] for k in run]
    where = f"layer {named[0]}" if len(named) == 1 else f"layers {named[0]} to {named[-1]}"
    share = sum(parts[layer]["risk"] for layer in named) / total
    return f"{100 * share:.0f} % of it in {where} ({_by_probe([parts[layer] for layer in named])})"


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
    return "adds up from " + ", ".join(f"{name} {value:+.2f}" for name, value in parts)

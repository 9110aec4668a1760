"""What the numbers of a run warn of: codes that have collapsed, and priors that learn their training codes by heart."""

from collections.abc import Iterable, Mapping, Sequence

COLLAPSED_PERPLEXITY = 2.0  # evenly used codes; below it a level carries less than one bit a code
COLLAPSED_NLL = 0.05  # nats per code: the prior knows the codes beforehand
OVERFITTED = 0.02  # by what share the last validation may be worse than the best


def codebook_warnings(validation: Mapping[str, float], levels: Iterable[str]) -> list[str]:
    """Warnings about the levels whose codebooks have collapsed; `validation` is the autoencoder's last one."""
    warnings = []
    for level in levels:
        perplexity = validation.get(f"perplexity_{level}")
        if perplexity is not None and perplexity < COLLAPSED_PERPLEXITY:
            warnings.append(
                f"level {level}: its codes have collapsed (perplexity {perplexity:.2f} on held-out images), so it "
                "carries next to nothing; train the autoencoder with restarts of unused codes, or without this level"
            )
    return warnings


def prior_warnings(level: str, entries: Sequence[Mapping[str, float]]) -> list[str]:
    """Warnings about one level's prior; `entries` are those of its history, in order of their steps."""
    validations = [(entry["step"], entry["validation/nll"]) for entry in entries if "validation/nll" in entry]
    if not validations:
        return []
    last = validations[-1][1]
    if last < COLLAPSED_NLL:
        return [
            f"level {level}: its codes are all but known beforehand ({last:.3f} nats per code on held-out images), "
            "so they have collapsed or repeat the coarser levels'; look at the autoencoder's reconstructions"
        ]
    step, best = min(validations, key=_value)
    if best < (1 - OVERFITTED) * last and _still_falls(entries, step):
        return [
            f"level {level}: its prior overfits: on held-out images {last:.3f} nats per code at the end, {best:.3f} at "
            f"step {int(step)}, while the training loss fell; train fewer steps, with more dropout, or on more images"
        ]
    return []


def _value(validation: tuple[float, float]) -> float:
    return validation[1]


def _still_falls(entries: Sequence[Mapping[str, float]], step: float) -> bool:
    """Whether the training loss after a step is below what it was for as long before it, on average."""
    before = [entry["train/loss"] for entry in entries if "train/loss" in entry and entry["step"] <= step]
    after = [entry["train/loss"] for entry in entries if "train/loss" in entry and entry["step"] > step]
    before = before[-len(after) :] if after else []
    return bool(before) and sum(after) / len(after) < sum(before) / len(before)

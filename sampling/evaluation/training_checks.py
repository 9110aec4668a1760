"""Warnings derived from the metrics of a run: collapsed codebooks and overfitted priors."""

from collections.abc import Iterable, Mapping, Sequence

MIN_PERPLEXITY = 2.0  # below it, a level carries less than one bit per code
MAX_SAME_CODES = 0.95  # share of codes that all images have in common, above which a level carries no information
MIN_NLL = 0.05  # nats per code; below it, the codes are almost deterministic
_FIX_COLLAPSE = "train the autoencoder with more unquantized_steps and with dead-code restarts, or remove the level"
OVERFIT_TOLERANCE = 0.02  # relative increase of the last validation NLL over the best one


def codebook_warnings(validation: Mapping[str, float], levels: Iterable[str]) -> list[str]:
    """Return one warning per level whose codebook has collapsed.

    `validation` holds the autoencoder's last validation metrics, among them `perplexity_LEVEL` and `same_codes_LEVEL`.
    """
    warnings = []
    for level in levels:
        perplexity = validation.get(f"perplexity_{level}")
        same_codes = validation.get(f"same_codes_{level}")
        reason = ""
        if perplexity is not None and perplexity < MIN_PERPLEXITY:
            reason = f"perplexity {perplexity:.2f} on held-out images"
        elif same_codes is not None and same_codes > MAX_SAME_CODES:
            reason = f"held-out images have {same_codes:.1%} of their codes in common"
        if reason:
            warnings.append(
                f"level {level}: codebook has collapsed ({reason}), so this level carries almost no information; "
                + _FIX_COLLAPSE
            )
    return warnings


def constant_codes_warning(level: str) -> str:
    """Return the warning about a level whose training codes are all equal."""
    return (
        f"level {level}: codebook has collapsed (all training codes are equal), so its prior has nothing to learn and "
        f"may become NaN; {_FIX_COLLAPSE}"
    )


def prior_warnings(level: str, entries: Sequence[Mapping[str, float]], keeps_best: bool = False) -> list[str]:
    """Return the warnings about one level's prior.

    Args:
        entries: Its metric log in the order of steps.
        keeps_best: Whether the saved weights are those of the best validation, so that later ones do not matter.
    """
    validations = [(entry["step"], entry["validation/nll"]) for entry in entries if "validation/nll" in entry]
    if not validations:
        return []
    last = validations[-1][1]
    if last < MIN_NLL:
        return [
            f"level {level}: codes are almost deterministic (NLL {last:.3f} nats per code on held-out images), so they "
            "have collapsed or duplicate the coarser levels; check the autoencoder's reconstructions"
        ]
    step, best = min(validations, key=_nll)
    if not keeps_best and best < (1 - OVERFIT_TOLERANCE) * last and _training_loss_decreases(entries, step):
        return [
            f"level {level}: prior overfits (validation NLL {last:.3f} nats per code at the end, {best:.3f} at step "
            f"{int(step)}, while the training loss decreased); use fewer steps, more dropout or more images"
        ]
    return []


def _nll(validation: tuple[float, float]) -> float:
    return validation[1]


def _training_loss_decreases(entries: Sequence[Mapping[str, float]], step: float) -> bool:
    """Return whether the mean training loss after `step` is below the mean over equally many entries before it."""
    before = [entry["train/loss"] for entry in entries if "train/loss" in entry and entry["step"] <= step]
    after = [entry["train/loss"] for entry in entries if "train/loss" in entry and entry["step"] > step]
    before = before[-len(after) :] if after else []
    return bool(before) and sum(after) / len(after) < sum(before) / len(before)

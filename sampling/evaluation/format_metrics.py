"""Format the metrics of a run as a plain-text table, one metric per line."""

from collections.abc import Callable
from typing import Any

_LABEL_WIDTH = 17


def format_metrics(metrics: dict[str, Any]) -> str:
    """Return the contents of metrics.json as a table, one line per metric. A missing metric has the reason."""
    lines = [*_training_lines(metrics), *_image_lines(metrics)]
    if "cas" in metrics:
        lines += format_cas(metrics["cas"])
    if "protocol" in metrics:
        lines.append(_line("protocol", _format_protocol(metrics["protocol"])))
    lines += [_line("warning", warning) for warning in metrics.get("warnings", [])]
    return "\n".join(lines)


def format_cas(result: dict[str, Any]) -> list[str]:
    """Return the classification accuracy score as one line for samples and one for real images, if measured."""
    if "missing" in result:
        return [_metric("CAS", result, str)]
    lines = []
    for label, score, source in (
        ("CAS", result, "samples"),
        ("CAS, real images", result.get("real"), "real images"),
    ):
        if score:
            accuracies = ", ".join(
                f"top-{key[3:]} {score[key]:.1%}" for key in ("top1", "top5") if score.get(key) is not None
            )
            warning = f"; {score['warning']}" if score.get("warning") else ""
            setup = f"{score['model']} trained on {score['trained_on']} {source}{warning}"
            lines.append(_line(label, f"{accuracies} on {score['tested_on']} held-out images ({setup})"))
            if score.get("recognized") is not None:
                lines.append(
                    _line(
                        "recognized",
                        f"{score['recognized']:.1%} of the samples, by the classifier of real images",
                    )
                )
    return lines


def _training_lines(metrics: dict[str, Any]) -> list[str]:
    lines = [_metric("reconstruction", metrics["reconstruction"], _format_reconstruction)]
    lines += [_metric(f"codes {level}", codes, _format_codes) for level, codes in metrics["codes"].items()]
    lines += [_metric(f"prior {level}", prior, _format_likelihood) for level, prior in metrics["likelihood"].items()]
    bits, per_dimension = metrics["bits_per_image"], metrics["bits_per_dimension"]
    return [
        *lines,
        _metric("bits per image", bits, lambda bits: f"{bits:,.0f}, {per_dimension:.4f} bits per dimension"),
    ]


def _format_reconstruction(values: dict[str, float]) -> str:
    return f"PSNR {values['psnr']:.2f} dB, SSIM {values['ssim']:.3f}"


def _format_codes(values: dict[str, float]) -> str:
    return f"usage {values['usage']:.0%}, perplexity {values['perplexity']:.1f}"


def _format_likelihood(values: dict[str, float]) -> str:
    baselines = f"uniform {values['uniform']:.3f}, unigram {values['unigram']:.3f}"
    if values["unigram"] > 0:  # 0 if all held-out codes are equal
        baselines += f"; {values['nll'] / values['unigram'] - 1:+.0%} relative to unigram"
    return f"NLL {values['nll']:.3f} nats per code ({baselines})"


def _image_lines(metrics: dict[str, Any]) -> list[str]:
    labels: dict[str, tuple[str, Callable[[Any], str]]] = {
        "fid": ("FID", lambda distance: distance["text"]),
        "kid": ("KID", lambda score: f"{score['mean']:.5f} ± {score['std']:.5f}"),
        "rfid": ("rFID", lambda distance: distance["text"]),
        "inception_score": ("Inception score", lambda score: f"{score['mean']:.2f} ± {score['std']:.2f}"),
        "precision_recall": (
            "precision/recall",
            lambda values: ", ".join(f"{name} {value:.3f}" for name, value in values.items()),
        ),
    }
    lines = [_metric(label, metrics[name], text) for name, (label, text) in labels.items() if name in metrics]
    # KID is unbiased for any number of images, so it leads if there are too few for a comparable FID.
    if "kid" in metrics and "missing" not in metrics["kid"] and not metrics["fid"].get("comparable"):
        lines[:2] = reversed(lines[:2])
    for network, values in metrics.get("features", {}).items():
        lines.append(network)
        if "missing" in values:
            lines[-1] = _metric(network, values, str)
            continue
        for name, label, kind in (
            ("fd", "FD", "fid"),
            ("rfd", "rFD", "rfid"),
            ("kd", "KD", "kid"),
            ("precision_recall", "neighborhoods", "precision_recall"),
        ):
            lines.append(_metric(f"  {label}", values[name], labels[kind][1]))
    return lines


def _format_protocol(protocol: dict[str, Any]) -> str:
    samples, reference = protocol["samples"], protocol["reference"]
    size = "×".join(map(str, samples["size"] or ()))
    weights = ""
    if inception := protocol.get("inception_weights"):
        standard = "standard" if protocol["standard_weights"] else "NOT the standard"
        weights = f"; {standard} Inception weights {inception[:8]}"
    count = reference["count"] or "an unknown number of"
    return (
        f"{samples['count']} samples of {size} pixels (seed {samples['seed']}), reference: {count} images from "
        f"{reference['name']}; resize {protocol['resize']}, crop {protocol['crop']}{weights}"
    )


def _metric(label: str, metric: Any, text: Callable[[Any], str]) -> str:
    """Return the line of a metric: its values as text, or the reason why it is missing."""
    missing = isinstance(metric, dict) and "missing" in metric
    return _line(label, f"-  ({metric['missing']})" if missing else text(metric))


def _line(label: str, text: str) -> str:
    return f"{label:<{_LABEL_WIDTH}}{text}" if len(label) < _LABEL_WIDTH else f"{label} {text}"

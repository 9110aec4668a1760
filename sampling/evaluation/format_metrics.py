"""Format the metrics of a run as a plain-text table, one metric per line."""

from typing import Any

_LABEL_WIDTH = 17


def format_metrics(metrics: dict[str, Any]) -> str:
    """Return the contents of metrics.json as a table, one line per metric."""
    lines = [*_training_lines(metrics), *_image_lines(metrics)]
    if "cas" in metrics:
        lines += format_cas(metrics["cas"])
    if "protocol" in metrics:
        lines.append(_line("protocol", _format_protocol(metrics["protocol"])))
    lines += [_line("warning", warning) for warning in metrics.get("warnings", [])]
    return "\n".join(lines)


def format_cas(result: dict[str, Any]) -> list[str]:
    """Return the classification accuracy score as one line for samples and one for real images, if measured."""
    lines = []
    for label, score, source in (
        ("CAS", result, "samples"),
        ("CAS, real images", result.get("real"), "real images"),
    ):
        if score:
            accuracies = ", ".join(f"top-{key[3:]} {score[key]:.1%}" for key in ("top1", "top5") if key in score)
            warning = f"; {score['warning']}" if "warning" in score else ""
            setup = f"{score['model']} trained on {score['trained_on']} {source}{warning}"
            lines.append(_line(label, f"{accuracies} on {score['tested_on']} held-out images ({setup})"))
    return lines


def _training_lines(metrics: dict[str, Any]) -> list[str]:
    reconstruction = metrics["reconstruction"]
    lines = [_line("reconstruction", f"PSNR {reconstruction['psnr']:.2f} dB, SSIM {reconstruction['ssim']:.3f}")]
    for level, codes in metrics["codes"].items():
        lines.append(_line(f"codes {level}", f"usage {codes['usage']:.0%}, perplexity {codes['perplexity']:.1f}"))
    for level, prior in metrics["likelihood"].items():
        baselines = f"uniform {prior['uniform']:.3f}, unigram {prior['unigram']:.3f}"
        if prior["unigram"] > 0:  # 0 if all held-out codes are equal
            baselines += f"; {prior['nll'] / prior['unigram'] - 1:+.0%} relative to unigram"
        lines.append(_line(f"prior {level}", f"NLL {prior['nll']:.3f} nats per code ({baselines})"))
    dimension = f"{metrics['bits_per_dimension']:.4f} bits per dimension"
    return [*lines, _line("bits per image", f"{metrics['bits_per_image']:,.0f}, {dimension}")]


def _image_lines(metrics: dict[str, Any]) -> list[str]:
    lines = [_line("FID", metrics["fid"]["text"])]
    if "kid" in metrics:
        # KID is unbiased for any number of images, so it leads if there are too few for a comparable FID.
        kid = _line("KID", f"{metrics['kid']['mean']:.5f} ± {metrics['kid']['std']:.5f}")
        lines.insert(1 if metrics["fid"]["comparable"] else 0, kid)
    if "rfid" in metrics:
        lines.append(_line("rFID", metrics["rfid"]["text"]))
    if "inception_score" in metrics:
        score = metrics["inception_score"]
        lines.append(_line("Inception score", f"{score['mean']:.2f} ± {score['std']:.2f}"))
    if "precision_recall" in metrics:
        values = ", ".join(f"{name} {value:.3f}" for name, value in metrics["precision_recall"].items())
        lines.append(_line("precision/recall", values))
    return lines


def _format_protocol(protocol: dict[str, Any]) -> str:
    samples, reference = protocol["samples"], protocol["reference"]
    size = "×".join(map(str, samples["size"] or ()))
    weights = "standard" if protocol["standard_weights"] else "NOT the standard"
    count = reference["count"] or "an unknown number of"
    return (
        f"{samples['count']} samples of {size} pixels (seed {samples['seed']}), reference: {count} images from "
        f"{reference['name']}; resize {protocol['resize']}, crop {protocol['crop']}; {weights} Inception weights "
        f"{protocol['inception_weights'][:8]}"
    )


def _line(label: str, text: str) -> str:
    return f"{label:<{_LABEL_WIDTH}}{text}"

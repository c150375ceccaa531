"""What `run/estimate.py` says, as tables and sentences."""

from typing import Any


def format_report(report: dict[str, Any]) -> str:
    """Write the numbers as tables and sentences."""
    ranks = f", {report['ranks']} ranks, {report['sharding']}" if report["ranks"] > 1 else ""
    lines = [
        f"memory of a device ({report['device']}, {report['dtype']}{ranks}; recomputation: {report['recomputation']})"
    ]
    lines += [f"  {name:26}{size:9.2f} GiB" for name, size in report["memory_gib"].items() if size]
    lines.append(f"  {'peak, in ' + report['peak_in']:26}{report['peak_gib']:9.2f} GiB")
    lines.append(f"steps {report['steps']}")
    for phase in report["phases"]:
        lines.append(
            f"  {phase['name']}: {phase['steps']} steps, {phase['epochs']:.4g} epochs, {phase['images_per_step']} "
            f"images and {phase['tflop_per_step_and_rank']:.4g} TFLOP (each rank) a step, "
            f"peak {phase['peak_gib']:.2f} GiB"
        )
    lines.append(
        f"disk: {report['checkpoint_gib']:.2f} GiB a checkpoint, {report['disk_gib']:.2f} GiB in all "
        f"({report['checkpoints_kept']} checkpoints, {report['evaluations']} evaluated teachers)"
    )
    if "step_s" in report:
        lines.append(
            f"time: {report['step_s']:.3f} s a step ({report['data_s']:.3f} s of it waiting for images), measured with "
            f"{report['measured_with']}; {report['total_hours']:.2f} h in all, without evaluations, checkpoints and "
            f"the exchange between ranks; {report['measured_peak_gib']:.2f} GiB were used, before any checkpoint"
        )
    if "not_measured" in report:
        lines.append(f"time: not measured, {report['not_measured']}")
    if report["available_gib"] is None:
        lines.append("whether it fits: give the memory of the GPU by --memory-gib")
    elif report["fits"]:
        lines.append(f"it fits in {report['available_gib']:.1f} GiB")
    else:
        lines.append(f"it does not fit in {report['available_gib']:.1f} GiB; tried:")
        lines += [
            f"  {change['peak_gib']:.2f} GiB{', fits' if change['fits'] else ''}: {' '.join(change['keys'])}"
            for change in report["changes"]
        ]
        if not any(change["fits"] for change in report["changes"]):
            lines.append("  none fits; use a smaller student.arch, smaller crops, or more ranks")
    return "\n".join(lines)

"""
Every learning-rate schedule of the library, and one of your own.

Draws examples/output/draw_schedules.png.
"""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
from picture import save

from fastopt import schedules
from fastopt.schedules import Schedule

STEPS = 100


def on_plateau() -> Schedule:
    """ReduceOnPlateau, told at every step a loss that falls for 30 steps and then stays."""
    schedule = schedules.ReduceOnPlateau(1.0, factor=0.5, patience=15)

    def rate(t: int) -> float:
        schedule.update(max(1.0 - t / 30, 0.1))
        return schedule(t)

    return rate


SCHEDULES: dict[str, Schedule] = {
    "constant": schedules.constant(1.0),
    "inverse_time_decay": schedules.inverse_time_decay(1.0, decay_rate=0.1),
    "inverse_sqrt_decay": schedules.inverse_sqrt_decay(1.0),
    "exponential_decay": schedules.exponential_decay(1.0, gamma=0.95),
    "step_decay": schedules.step_decay(1.0, step_size=25, gamma=0.5),
    "piecewise_constant": schedules.piecewise_constant([20, 70], [0.5, 1.0, 0.1]),
    "linear": schedules.linear(1.0, 0.0, STEPS),
    "polynomial": schedules.polynomial(1.0, 0.0, STEPS, power=2),
    "cosine_annealing": schedules.cosine_annealing(1.0, STEPS),
    "cosine_restarts": schedules.cosine_restarts(1.0, 14, mult=2),
    "one_cycle": schedules.one_cycle(1.0, STEPS),
    "warmup": schedules.warmup(schedules.cosine_annealing(1.0, STEPS - 20), 20),
    "join": schedules.join([schedules.constant(1.0), schedules.linear(1.0, 0.0, 50)], [50]),
    "per_epoch": schedules.per_epoch(schedules.inverse_time_decay(1.0, 1), 20),
    "ReduceOnPlateau": on_plateau(),
    "your own: lambda t: ...": lambda t: 0.5 + 0.5 * math.sin(t / 8) * math.exp(-t / 50),
}


def main() -> None:
    figure, axes = plt.subplots(
        4, 4, figsize=(10, 7.5), sharex=True, sharey=True, layout="constrained"
    )
    for ax, (name, schedule) in zip(axes.flat, SCHEDULES.items(), strict=True):
        schedules.plot(schedule, STEPS, ax)
        ax.set_title(name, family="monospace", fontsize=9)
        ax.grid(alpha=0.3)
        ax.label_outer()
    save(figure, "draw_schedules")


if __name__ == "__main__":
    main()

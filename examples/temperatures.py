"""
A year of temperatures, smoothed by exponentially weighted averages.

The larger the decay, the smoother the curve and the more it lags behind; without bias correction
it starts at zero.

Draws examples/output/temperatures.png.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from picture import save

from fastopt import exponential_moving_average


def main() -> None:
    rng = np.random.default_rng(0)
    day = np.arange(365)
    weather = 10 * exponential_moving_average(rng.standard_normal(365), 0.7)  # warm and cold spells
    temperature = 12 - 9 * np.cos(2 * np.pi * (day - 20) / 365) + weather

    figure, (ax, start) = plt.subplots(
        1, 2, figsize=(10, 4.5), layout="constrained", width_ratios=(1.5, 1)
    )
    for each in (ax, start):
        each.plot(day, temperature, ".", color="tab:blue", alpha=0.4, label="temperature")
        each.set(xlabel="day", ylabel="°C")
        each.grid(alpha=0.3)
    for decay, color in ((0.5, "tab:orange"), (0.9, "tab:red"), (0.98, "tab:green")):
        average = exponential_moving_average(temperature, decay)
        days = round(1 / (1 - decay))
        ax.plot(day, average, color=color, label=f"decay {decay}, about {days} days")
        print(f"decay {decay}: about {days} days, on day 200 {average[200]:.1f} °C")
    for corrected, style in ((True, "-"), (False, "--")):
        average = exponential_moving_average(temperature, 0.98, bias_correction=corrected)
        label = f"decay 0.98, {'with' if corrected else 'without'} bias correction"
        start.plot(day, average, style, color="tab:green", label=label)
    ax.set_title("Three decays")
    start.set(title="Bias correction", xlim=(0, 100), ylim=(-8, 26))
    ax.legend(loc="lower center", fontsize="small")
    start.legend(loc="upper left", fontsize="small")
    save(figure, "temperatures")


if __name__ == "__main__":
    main()

"""Losses of a run of 60 steps, shared by the tests of AutoWU."""

import numpy as np

T = 60
FALLING = np.linspace(3.0, 1.0, T)
BOWL = np.where(np.arange(T) < 14, 3.0 - 0.15 * np.arange(T), 0.9 + 0.1 * (np.arange(T) - 14))

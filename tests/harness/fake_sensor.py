"""A board of paper with a power sensor of known period, window and phase, on a clock of its own; what is polled is exact but for noise."""

import random


class FakeBoard:
    """Draws `idle_w` or `load_w`; the load is fed 8 ms at a time, as a queue of launches would be.

    The reading is updated every `period_s` with the mean power of the `window_s` that ended `lag_s` before. The counter steps every
    `counter_s` by the mean power of the last `counter_window_s` of it, times its period. `rise_s`: the time constant with which the power
    follows the load. `step_w`: what the reading is rounded to.
    """

    ahead_s = 0.008

    def __init__(
        self, *, period_s=0.1, window_s=0.025, phase_s=0.013, lag_s=0.0, counter_s=0.1, counter_window_s=None, idle_w=80.0, load_w=620.0,
        noise=0.01, step_w=0.001, rise_s=0.0, jitter=0.0, poll_s=0.0003, dies_at=float("inf"), seed=0,
    ):  # fmt: skip
        self.now, self.spans = 0.0, []
        self.period_s, self.window_s, self.phase_s, self.lag_s = period_s, window_s, phase_s, lag_s
        self.counter_s, self.counter_window_s = counter_s, counter_window_s or counter_s
        self.idle_w, self.load_w, self.noise, self.step_w, self.rise_s = idle_w, load_w, noise, step_w, rise_s
        self.jitter, self.poll_s, self.dies_at = jitter, poll_s, dies_at
        self.random = random.Random(seed)
        self.reading, self.next_s, self.joules, self.steps = idle_w, phase_s, 0.0, 0

    # what drives a recording
    def clock(self):
        self.now += 1e-6
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def feed(self):
        end = self.now + self.ahead_s
        if self.spans and self.spans[-1][1] >= self.now:
            self.spans[-1][1] = end
        else:
            self.spans.append([self.now, end])

    def idle(self):
        return not self.spans or self.spans[-1][1] <= self.now

    # what the board does
    def mean_w(self, start, end):
        if self.rise_s:
            points = [start + (end - start) * (i + 0.5) / 40 for i in range(40)]
            return sum(self._risen_w(at) for at in points) / 40
        on = sum(max(0.0, min(end, b) - max(start, a)) for a, b in self.spans[-200:])
        return self.idle_w + (self.load_w - self.idle_w) * on / (end - start)

    def _risen_w(self, at):
        import math

        share = 0.0
        for a, b in self.spans[-12:]:
            if at > a:
                share += math.exp(-max(at - b, 0.0) / self.rise_s) - math.exp(-(at - a) / self.rise_s)
        return self.idle_w + (self.load_w - self.idle_w) * min(share, 1.0)

    def _poll(self):
        self.now += self.poll_s * self.random.uniform(0.5, 1.5)
        return self.now < self.dies_at

    def power_w(self):
        alive = self._poll()
        while self.next_s <= self.now:
            end = self.next_s - self.lag_s
            mean = self.mean_w(end - self.window_s, end) * (1 + self.noise * self.random.gauss(0, 1))
            self.reading = round(mean / self.step_w) * self.step_w
            self.next_s += self.period_s * (1 + self.jitter * self.random.uniform(-1, 1))
        return self.reading if alive else None

    def energy_j(self):
        alive = self._poll()
        while (self.steps + 1) * self.counter_s <= self.now:
            self.steps += 1
            end = self.steps * self.counter_s
            self.joules += self.mean_w(end - self.counter_window_s, end) * self.counter_s
        return round(self.joules, 3) if alive else None

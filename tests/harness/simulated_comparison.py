"""Comparisons of made-up pairs: what the rule says of noise whose size is known."""

import math
import random
import statistics
from collections import Counter
from dataclasses import dataclass

from klab.harness.watch.compare_rule import LOOKS, Answer, Halfway, Question, overall, together

MOST = 20


@dataclass(frozen=True)
class Noise:
    """Of a replicate's log ratio: `own` its standard deviation, `common` what all pairs of a pass share, `spikes` the share of replicates
    that are `spike` times as noisy."""

    own: float
    common: float = 0.0
    spikes: float = 0.0
    spike: float = 10.0


def comparison(effects, noise, rng, most=MOST):
    """(answers, the overall answer, passes that were made) of one comparison with these true log ratios."""
    questions = [Question() for _ in effects]
    told = [[] for _ in effects]
    looks = (*(n for n in LOOKS if n < most), most)
    count = len(effects) + (len(effects) > 1)
    passes = 0
    while passes < most and any(question.open for question in questions):
        passes += 1
        shared = rng.gauss(0, noise.common)
        for question, effect, logs in zip(questions, effects, told, strict=True):
            if question.open:
                size = noise.own * (noise.spike if rng.random() < noise.spikes else 1.0)
                logs.append(effect + shared + rng.gauss(0, size))
                question.add((logs[-1], None))
        for question in questions:
            if question.due(looks):
                question.look(count, looks=looks)
    found = [question.found for question in questions]
    common = min(map(len, told))
    mean = found[0] if len(found) == 1 else together([[logs[n] for logs in told] for n in range(common)], questions=count)
    return [f.answer for f in found], overall(found, mean)[0], passes


def rates(effects, noise, *, times, seed=0, most=MOST):
    """Of `times` comparisons: (share per answer of the pairs with an effect or, without any, of all; share per overall answer; how often a
    pair without an effect was called faster or slower; mean passes)."""
    rng = random.Random(seed)
    pairs, whole, wrong, passes = Counter(), Counter(), 0, []
    for _ in range(times):
        answers, answer, made = comparison(effects, noise, rng, most)
        looked_at = [a for a, effect in zip(answers, effects, strict=True) if effect or not any(effects)]
        pairs.update(looked_at)
        whole[answer] += 1
        wrong += any(a in (Answer.SLOWER, Answer.FASTER) for a, effect in zip(answers, effects, strict=True) if not effect)
        passes.append(made)
    total = pairs.total()
    return (
        {answer: pairs[answer] / total for answer in Answer},
        {answer: whole[answer] / times for answer in Answer},
        wrong / times,
        statistics.fmean(passes),
    )


def hunt(count, ratio, noise, rng, most=MOST):
    """One search among `count` commits of which a random one brings `ratio`: "found", "several" (of which one is it), "wrong", or "no
    difference" where the ends cannot be told apart."""
    effect = math.log(ratio)
    guilty = rng.randrange(1, count + 1)

    def measure(question, size, questions):
        looks = (*(n for n in LOOKS if n < most), most)
        while question.open:
            question.add((size + rng.gauss(0, noise.own), None))
            if question.due(looks):
                question.look(questions, looks=looks)
        return question.found

    ends = measure(Question(), effect, 1)
    if ends.answer not in (Answer.SLOWER, Answer.FASTER):
        return "no difference"
    good, bad, skipped = 0, count, set()
    questions = math.ceil(math.log2(count)) + 1
    while left := [n for n in range(good + 1, bad) if n not in skipped]:
        middle = min(left, key=lambda n: abs(2 * n - good - bad))
        found = measure(Halfway(threshold=math.log(ends.ratio) / 2), effect if middle >= guilty else 0.0, questions)
        if found.answer is ends.answer:
            bad = middle
        elif found.answer is Answer.SAME:
            good = middle
        else:
            skipped.add(middle)
    left = range(good + 1, bad + 1)
    return "wrong" if guilty not in left else "found" if len(left) == 1 else "several"

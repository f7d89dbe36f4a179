"""Random problems of the planner, and their answers by trying everything."""

import itertools

from ms_memory.planner import Layer, LayerOption, Option, Problem, Site, Span, chain


def _layer_option(random, index, swaps):
    held = random.randint(0, 60)
    swap = swaps and random.random() < 0.4
    return LayerOption(
        f"option {index}",
        held,
        held + random.randint(0, 40),
        held + random.randint(0, 40),
        leaving=random.randint(0, 9) * swap,
        time=random.randint(0, 30),
        host=random.randint(0, 20) * swap,
    )


def random_chain(random, layers, options):
    """Layers in a row: every event its own base, some layers with swaps, 1 to 3 in flight."""
    swaps, in_flight = random.random() < 0.5, random.choice((1, 1, 2, 3))
    made = [
        Layer(
            f"layer {i}",
            tuple(_layer_option(random, k, swaps) for k in range(random.randint(1, options))),
            in_flight,
        )
        for i in range(layers)
    ]
    return chain(made, [random.randint(0, 5) for _ in range(2 * layers + 1)])


def random_graph(random, sites, options):
    """Lifetimes that do not nest: what residual branches and shared inputs look like."""
    events = random.randint(2, 6)

    def option(index):
        spans = []
        for _ in range(random.randint(0, 3)):
            start = random.randrange(events)
            spans.append(Span(start, random.randint(start, events), random.randint(0, 50)))
        host = random.choice((0, random.randint(0, 20)))
        return Option(f"option {index}", tuple(spans), random.randint(0, 30), host)

    made = tuple(
        Site(f"site {i}", tuple(option(k) for k in range(random.randint(1, options))))
        for i in range(sites)
    )
    base = tuple(random.randint(0, 9) for _ in range(events))
    return Problem(tuple(f"event {e}" for e in range(events)), base, made)


def random_instance(random, size=5, options=4):
    """A problem, a budget that may be too small or ample, and a budget of the host or None."""
    make = random.choice((random_chain, random_chain, random_graph))
    problem = make(random, random.randint(1, size), options)
    peaks = [max(problem.live(picks)) for picks in plans(problem)]
    budget = random.randint(max(0, min(peaks) - 3), max(peaks))
    return problem, budget, random.choice((None, None, random.randint(0, 60)))


def plans(problem):
    return itertools.product(*(range(len(site.options)) for site in problem.sites))


def best(problem, budget, host_budget):
    """Return the least (time, host bytes) by trying every plan; None: none fits."""
    found = None
    for picks in plans(problem):
        chosen = [site.options[pick] for site, pick in zip(problem.sites, picks, strict=True)]
        cost = sum(o.time for o in chosen), sum(o.host for o in chosen)
        if host_budget is not None and cost[1] > host_budget:
            continue
        if (found is None or cost < found) and max(problem.live(picks)) <= budget:
            found = cost
    return found


def least_budget(problem, host_budget):
    """Return the smallest budget that has a plan; None: the host has too little room."""
    peaks = [
        max(problem.live(picks))
        for picks in plans(problem)
        if host_budget is None
        or sum(s.options[p].host for s, p in zip(problem.sites, picks, strict=True)) <= host_budget
    ]
    return min(peaks, default=None)

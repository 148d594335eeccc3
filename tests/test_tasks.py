"""Tasks: the checker against the oracle, against malformed text, and splits that never overlap."""
import itertools
import random

import numpy as np
import pytest

from minipav.tasks import countdown, make_task
from minipav.tasks.calculator import TOP, Problem, apply, distance, dp, transitions
from minipav.tasks.task import LOWER, Task
from minipav.tokenizer import END, decode_rows, encode_rows, synthetic_encoding
from minipav.utils import Fail

TASKS = [("calculator", dict(H=5, min_steps=3)), ("countdown", {})]


@pytest.mark.parametrize("name, dials", TASKS)
def test_splits_are_disjoint_for_all_seeds(name, dials):
    """A problem belongs to a split by its own hash: no other seed's training set holds a test problem."""
    task = make_task(name, dials)
    drawn = {s: {task.prompt(p) for seed in (0, 1) for p in task.problems(s, 100, seed)}
             for s in ("train", "validation", "test")}
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(drawn.values(), 2))
    assert task.problems("test", 100, 0) == task.problems("test", 100, 0) != task.problems("test", 100, 1)
    assert len({task.prompt(p) for p in task.problems("test", 100, 0)}) == 100
    here, later = task.batches(10, 2, 0, 0), task.batches(10, 2, 0, 20)
    assert {task.split_of(p) for p in here + later} == {"train"} and here != later and len(here) == 20


@pytest.mark.parametrize("name, dials", TASKS)
def test_directed_demonstrations_are_right_and_undirected_ones_legal(name, dials):
    task, rng = make_task(name, dials), np.random.default_rng(0)
    problems = task.problems("train", 300, 0)
    assert all(task.judge(p, d) == "right" for p, d in zip(problems, task.demonstrations(problems, 1.0, rng)))
    verdicts = [task.judge(p, d) for p, d in zip(problems, task.demonstrations(problems, 0.0, rng))]
    assert "illegal" not in verdicts and verdicts.count("planning") > 200


@pytest.mark.parametrize("name, dials", TASKS)
def test_corrupted_traces_are_all_wrong_from_the_step_named(name, dials):
    task, rng = make_task(name, dials), np.random.default_rng(0)
    problems = task.problems("train", 300, 0)
    demos = task.demonstrations(problems, 0.5, rng)
    texts, first = task.corrupt(problems, demos, rng)
    for p, d, t, w in zip(problems, demos, texts, first):
        assert task.judge(p, t) == "illegal"
        assert task.steps(t)[:w] == task.steps(d)[:w] and task.steps(t)[w] != task.steps(d)[w]
    assert len({int(w) for w in first}) > 2


@pytest.mark.parametrize("name, dials", TASKS)
def test_a_corrupted_step_is_the_first_illegal_one_whatever_the_response(name, dials):
    """Also of a response that is itself garbage, too long, cut off or empty: two wrongs may make a right."""
    task, rng = make_task(name, dials), np.random.default_rng(0)
    problems = task.problems("train", 40, 0)
    demos = task.demonstrations(problems, 0.5, rng)
    bodies = [d.removesuffix(END) for d in demos]
    for responses in (bodies, [b[:k] for k, b in enumerate(bodies)], ["+1 = 1\n" + b + END for b in bodies],
                      [b + "\n" + b + END for b in bodies], [b[::-1] for b in bodies],
                      ["", END, "7 \n", "\n"] * 10):
        texts, first = task.corrupt(problems, responses, rng)
        for p, t, w in zip(problems, texts, first):
            head = task.steps(t)[:w + 1]
            assert t.endswith(END) and task.judge(p, "\n".join(head) + END) == "illegal"
            assert w == 0 or task.judge(p, "\n".join(head[:-1]) + END) != "illegal"


@pytest.mark.parametrize("name, dials", TASKS)
def test_malformed_responses_score_zero(name, dials):
    """Whatever is not a right answer to the letter is worth nothing: eighteen malformed copies of each of a
    hundred right answers, and four random mutations, which count only if an independent reader finds them
    right too."""
    task, rng = make_task(name, dials), random.Random(0)
    problems = task.problems("train", 100, 0)
    demos = task.demonstrations(problems, 1.0, np.random.default_rng(0))
    for p, d in zip(problems, demos):
        body = d.removesuffix(END)
        bad = [body, body + "\n" + END, body + " " + END, "\n" + d, d + END, d + "x", body + "\n+1 = 0" + END,
               END, "", body.replace(" = ", "="), body.replace(" = ", " =  "), body.replace("= ", "= 0"),
               body + "\r" + END, body + "\n" + body + END, "__import__('os')" + END, body + ".0" + END,
               body.replace("= ", "= +"), body.translate(str.maketrans("123456789", "١٢٣٤٥٦٧٨٩")) + END]
        for b in bad:
            assert task.outcome(p, b) == 0, b
        for _ in range(4):
            i = rng.randrange(len(body))
            mutant = body[:i] + rng.choice("0123456789+-*/= \n") + body[i + rng.choice((0, 1)):] + END
            if task.outcome(p, mutant):
                assert READERS[name](p, mutant)


def compute(a, sign, b):
    return {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]


def read_calculator(problem, response):
    """An independent check of a response that was judged right."""
    v = problem.start
    for line in response.removesuffix(END).split("\n"):
        op, result = line.split(" = ")
        assert op in [s + str(x) for s, x in zip("+-*/", problem.ops)]
        assert compute(v, op[0], int(op[1])) == int(result)
        v = int(result)
    return v == problem.target


def read_countdown(problem, response):
    numbers = sorted(problem.numbers)
    for line in response.removesuffix(END).split("\n"):
        a, sign, b, _, result, _, *left = line.replace("(", " ").replace(")", "").split()
        numbers.remove(int(a))
        numbers.remove(int(b))
        numbers = sorted([*numbers, int(result)])
        assert compute(int(a), sign, int(b)) == int(result) and sorted(map(int, left)) == numbers
    return numbers == [problem.target]


READERS = {"calculator": read_calculator, "countdown": read_countdown}


@pytest.mark.parametrize("slip, words", [
    (dict(max_step_tokens=2), "step of more than max_step_tokens 2"),
    (dict(max_new_tokens=9), "max_new_tokens 9"), (dict(max_steps=2), "max_steps 2"),
    (dict(prompt=lambda p: f"from {p}"), "prompt without the delimiter"),
    (dict(judge=lambda p, text: True), "judged True, not 'right'"),
    (dict(demonstrations=lambda problems, share, rng: ["+1 = 2"] * len(problems)), "END")])
def test_a_task_is_tried_out_before_a_policy_learns_it(slip, words):
    task = make_task("calculator", {})
    enc = synthetic_encoding(task.phrases)
    task.room(enc)
    vars(task).update(slip)
    with pytest.raises(Fail, match=f"task calculator: its right demonstration .*{words}"):
        task.room(enc)


def test_many_problems_are_drawn_in_chunks():
    task = make_task("calculator", {})
    last = task.draw(5000, np.random.default_rng(0))[-50:]
    far = distance(transitions(last), np.array([p.start for p in last]), task.H)
    assert all(task.min_steps <= f[p.target] <= task.H for p, f in zip(last, far))


def test_a_row_has_room_for_the_prompt():
    task = make_task("calculator", {})
    task.prompt = lambda p: "x" * 300 + f"{p}\n"
    assert task.room(synthetic_encoding(task.phrases)) > 300 + 2 * task.max_new_tokens


def test_too_many_steps_score_zero():
    task = make_task("calculator", dict(H=2, min_steps=1))
    p = Problem(10, 13, (1, 2, 3, 4))
    assert task.outcome(p, "+1 = 11\n+1 = 12" + END) == 0
    assert task.outcome(Problem(10, 12, (1, 2, 3, 4)), "+1 = 11\n+1 = 12" + END) == 1
    assert task.outcome(p, "+1 = 11\n+1 = 12\n+1 = 13" + END) == 0
    assert make_task("calculator", dict(H=3, min_steps=1)).outcome(p, "+1 = 11\n+1 = 12\n+1 = 13" + END) == 1


def test_calculator_values_equal_enumeration():
    """Every sequence of operations, by hand, against dynamic programming and breadth-first distance."""
    H, problems = 4, make_task("calculator", dict(H=4, min_steps=2)).problems("test", 8, 0)
    nxt, target = transitions(problems), np.array([p.target for p in problems])
    Q, V = dp(nxt, target, H)
    dist = distance(nxt, np.array([p.start for p in problems]), H)

    def value(p, v, left):
        if v == p.target:
            return 1.0, 0
        a, b, c, d = p.ops
        ways = [w for w in (v + a, v - b, v * c, v / d) if w == int(w) and 1 <= w < TOP] if left else []
        each = [value(p, int(w), left - 1) for w in ways]
        return (sum(e[0] for e in each) / len(each), 1 + min(e[1] for e in each)) if each else (0.0, 99)
    for i, p in enumerate(problems):
        v, d = value(p, p.start, H)
        assert abs(V[i, 0, p.start] - v) < 1e-6 and dist[i, p.target] == d and 2 <= d <= H and v > 0
        assert np.allclose(V[i, 0, p.start], Q[i, 0, p.start][nxt[i, p.start] > 0].mean())


@pytest.mark.parametrize("skew", [1.0, 4.0])
def test_directed_walks_are_the_other_walks_given_success(skew):
    """Bayes by rejection: the share of first operations among successful walks. How many succeed is the exact
    value; with a skew, + is so much likelier a first step than any other."""
    task, rng = make_task("calculator", dict(H=3, min_steps=2, skew=skew)), np.random.default_rng(0)
    problems = task.problems("train", 50, 0)
    value = task.exact(problems)
    ways = [[s for s, x in zip("+-*/", p.ops) if apply(s, p.start, x)] for p in problems]
    i = max((i for i in range(50) if "+" in ways[i][:-1]), key=lambda i: value(i, ""))
    p = problems[i]
    demos = task.demonstrations([p] * 4000, 0.0, rng)
    good = [d for d in demos if task.judge(p, d) == "right"]
    directed = task.demonstrations([p] * 4000, 1.0, rng)
    for first in {d.split("\n")[0] for d in directed}:
        a, b = (sum(d.startswith(first) for d in ds) / len(ds) for ds in (good, directed))
        assert abs(a - b) < 4 * (0.25 / len(good)) ** 0.5
    assert abs(len(good) / 4000 - value(i, "")) < 4 * (0.25 / 4000) ** 0.5
    plus = sum(d[0] == "+" for d in demos) / 4000
    assert abs(plus - skew / (skew + len(ways[i]) - 1)) < 4 * (0.25 / 4000) ** 0.5


def test_countdown_values_are_those_of_random_play():
    """Behind a prefix: the share of right answers among random plays from there; nothing is worth a step that
    is wrong, or one number that is left without an end."""
    task, rng = make_task("countdown", dict(numbers=3)), np.random.default_rng(0)
    problems = task.problems("test", 5, 0)
    exact = task.exact(problems)
    for i, p in enumerate(problems):
        [one, two] = countdown.as_lines(p.numbers, p.hint)
        for prefix, left in (("", p.numbers), (one + "\n", countdown.after(p.numbers, p.hint[0]))):
            plays = [countdown.play(left, rng)[1] for _ in range(2000)]
            share = sum(x == (p.target,) for x in plays) / 2000
            assert abs(exact(i, prefix) - share) < 4 * (0.25 / 2000) ** 0.5
        assert exact(i, f"{one}\n{two}{END}") == 1 and exact(i, f"{one}\n{two}\n") == 0
        assert exact(i, "1 + 1 = 3 (left: 3 3)\n") == 0


def test_countdown_oracle_knows_what_is_solvable():
    task = make_task("countdown", {})
    for p in task.problems("test", 20, 0):
        assert countdown.value(p.numbers, p.target) > 0 and all(1 <= n <= 25 for n in p.numbers)
    assert countdown.value((1, 1, 1, 1), 90) == 0
    # (3 3 3): 3+3=6 3-3 illegal 3*3=9 3/3=1, then with 3: {9,3,18,2}, {12,6,27,3}, {4,2,3,3}
    assert abs(countdown.value((3, 3, 3), 18) - 1 / 12) < 1e-12
    p = countdown.Problem((2, 3, 5, 7), 30, ())
    hits = [task.judge(p, d) for d in task.demonstrations([p] * 3000, 0.0, np.random.default_rng(0))]
    v = countdown.value((2, 3, 5, 7), 30)
    assert abs(hits.count("right") / 3000 - v) < 4 * (v * (1 - v) / 3000) ** 0.5 + 1e-9


def test_the_state_of_countdown_is_the_numbers_that_are_left():
    task = make_task("countdown", {})
    one, two = "19 - 12 = 7 (left: 3 5 7)", "5 - 2 = 3 (left: 7 5 3)"
    assert task.state(one + "\n") == task.state(two + "\n") != task.state("3 * 5 = 15 (left: 7 15)\n")
    assert task.state(one + "\n") != task.state(one + END)


def test_tokens_are_one_per_integer_operation_newline_and_any_text_survives():
    task = make_task("calculator", {})
    enc = synthetic_encoding(task.phrases)
    operations = [f"{s}{d}" for s in "+-*/" for d in range(1, 10)]
    for text in [*map(str, range(100)), *operations, "\n", *task.phrases]:
        assert len(enc.encode(text)) == 1, text
    assert len(enc.encode(END, allowed_special="all")) == 1 and enc.n_vocab == enc.eot_token + 2
    texts = ["*2 = 46\n", "naïve 東京 \x00 +10 = 007 --1" + END, "100 + 7 ∑"]
    assert decode_rows(enc, *encode_rows(enc, texts)) == texts
    with pytest.raises(ValueError):
        enc.encode(END)                                                         # never by accident


def test_too_few_problems_are_told_before_anything_is_trained():
    class Few(Task):
        name, rounds = "few", 0

        def draw(self, n, rng):
            self.rounds += 1
            return [(int(i),) for i in rng.integers(1000, size=n)]

        def prompt(self, problem):
            return f"{problem}"
    task = Few()
    size = {split: sum(task.split_of((i,)) == split for i in range(1000)) for split in LOWER}
    task.check(20 * size["validation"], size["test"], 0)
    for problems, test, words in ((size["train"] + 1, 1, "--batch_size"), (1, size["test"] + 1, "--test"),
                                  (20 * size["validation"] + 20, 1, "20 at least")):
        with pytest.raises(Fail, match=words):
            task.check(problems, test, 0)
    assert task.rounds < 300, "and then the search for more comes to an end"
    assert all(task.problems("test", 1, seed) for seed in range(200))

"""Intervals, claims and resumed rows of the experiments, against computations written out here."""

import gzip
import json

import numpy as np
import pytest
from experiments import frequency_guidance, report, runs
from scipy import stats

CASES = 40
RNG = np.random.default_rng(7)
SUBJECTS = np.repeat(np.arange(CASES // 4), 4)


def rows_of(arm, values, **more):
    return [
        {"arm": arm, "case": i, "subject": int(SUBJECTS[i]), "error": v, **more} for i, v in enumerate(values)
    ]


def test_the_interval_without_clusters_is_that_of_scipy():
    values = RNG.normal(3, 1, CASES)
    mean, low, high = report.bootstrap(values, np.arange(CASES))
    other = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", random_state=1)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx(tuple(other.confidence_interval), abs=0.02)


def test_whole_clusters_are_resampled():
    """Cases of a cluster that are all alike say as much as one of them."""
    per_subject = RNG.normal(0, 1, CASES // 4)
    whole = report.bootstrap(np.repeat(per_subject, 4), SUBJECTS)
    assert whole == pytest.approx(report.bootstrap(per_subject, np.arange(CASES // 4)))
    single = report.bootstrap(np.repeat(per_subject, 4), np.arange(CASES))
    assert single[2] - single[1] < 0.7 * (whole[2] - whole[1])


def test_clusters_of_unlike_size_weigh_by_their_cases():
    values, clusters = np.array([1.0, 1, 1, 5]), np.array(["a", "a", "a", "b"])
    mean, low, high = report.bootstrap(values, clusters)
    assert mean == 2 and (low, high) == (1, 5)


@pytest.mark.parametrize(("shift", "verdict"), [(-1.0, "holds"), (-0.05, "in the mean"), (1.0, "not")])
def test_a_claim_holds_by_its_paired_interval(shift, verdict):
    base = RNG.normal(50, 20, CASES)  # the cases' own spread is far larger than the difference
    noise = RNG.normal(0, 1, CASES)
    noise -= noise.mean()
    rows = rows_of("ours", 0.5 * base + shift + noise) + rows_of("none", base)
    found = report.judged(rows, report.Claim("half", "ours", "error", "none", 0.5))
    assert found["verdict"] == verdict and found["too much"][0] == pytest.approx(shift, abs=1e-3)
    more = report.Claim("half at least", "none", "error", "ours", 2.0, at_least=True)
    assert report.judged(rows, more)["verdict"] == ("not" if verdict == "not" else verdict)


def test_no_lower_allows_five_points():
    values = np.tile([0.0, 1.0], CASES // 2)
    rows = rows_of("ours", values - 0.03) + rows_of("none", values)
    claim = report.Claim("no lower", "ours", "error", "none", margin=0.05, at_least=True)
    assert report.judged(rows, claim)["verdict"] == "holds"
    assert report.judged(rows_of("ours", values - 0.07) + rows_of("none", values), claim)["verdict"] == "not"


def test_a_number_may_be_the_other_side():
    rows = rows_of("ours", np.r_[np.ones(36), np.zeros(4)])
    share = report.Claim("75 %", "ours", "error", 0.75, at_least=True)
    assert report.judged(rows, share)["verdict"] == "holds"
    assert report.judged(rows, report.Claim("", "nobody", "error", 0.75)) is None


def test_rows_of_one_case_are_one_value_and_only_shared_cases_are_compared():
    rows = rows_of("ours", [1.0] * 10) + rows_of("ours", [3.0] * 10) + rows_of("none", [4.0] * CASES)
    found = report.judged(rows, report.Claim("", "ours", "error", "none", 0.5))
    assert found["cases"] == 10 and found["too much"] == [0, 0, 0]
    assert report.table(rows, ["ours", "none"], ["error"])["ours"] == {"cases": 10, "error": [2, 2, 2]}


def test_a_killed_run_makes_only_what_is_left(tmp_path):
    made = []

    def make(some):
        made.extend(some)
        if 5 in some:
            raise KeyboardInterrupt
        picture = np.zeros((2, 2, 3), np.uint8)
        return [{"case": i, "error": i / 3, "seen": "cat"} for i in some], {str(i): picture for i in some}

    with pytest.raises(KeyboardInterrupt):
        runs.run(runs.Rows(tmp_path, "an arm", "settings"), range(8), 2, make)
    assert made == [0, 1, 2, 3, 4, 5]
    runs.run(runs.Rows(tmp_path, "an arm", "settings"), range(6), 2, lambda some: ([{"case": i} for i in some], {}))
    found = runs.newest(tmp_path, "an arm")
    assert [row["case"] for row in found] == [0, 1, 2, 3, 4, 5]
    assert found[1]["error"] == pytest.approx(1 / 3, abs=1e-4)
    assert found[1]["arm"] == "an arm" and found[1]["seen"] == "cat" and "seconds" in found[1]
    assert runs.Rows(tmp_path, "an arm", "other settings").left(range(3)) == [0, 1, 2]


def test_settings_that_are_asked_for_again_are_the_ones_reported(tmp_path):
    for settings, error in (("first", 1.0), ("second", 2.0)):
        kept = runs.Rows(tmp_path, "an arm", settings)
        kept.add([{"case": 0, "error": error}], {})
    runs.run(runs.Rows(tmp_path, "an arm", "first"), [0], 1, None)
    assert [row["error"] for row in runs.newest(tmp_path, "an arm")] == [1.0]


def test_frequency_guidance_resamples_puppets_and_not_their_cases():
    per_puppet = RNG.normal(0, 1, 24)
    rows = [
        {"arm": arm, "case": i, "driver_view": "far", "background_error": (arm == frequency_guidance.OURS) * value}
        for arm in (frequency_guidance.OURS, frequency_guidance.LEARNED)
        for i, value in enumerate(np.tile(per_puppet, 5))
    ]
    found = frequency_guidance.tables(rows)
    expected = report.bootstrap(per_puppet, np.arange(24))
    assert found["arms"][frequency_guidance.OURS]["background_error"] == pytest.approx(expected)
    (claim,) = found["claims"]
    assert claim["too much"] == pytest.approx([round(value, 4) for value in expected])


def test_compressed_rows_are_the_plain_ones_and_the_same_file_each_time(tmp_path):
    rows = [{"arm": "ours", "case": 0, "error": 1.5}, {"arm": "ours", "case": 1, "right": True}]
    for name in ("x.csv", "x.csv.gz", "y.csv.gz"):
        report.write_csv(tmp_path / name, rows)
    plain, packed, again = ((tmp_path / name).read_bytes() for name in ("x.csv", "x.csv.gz", "y.csv.gz"))
    assert gzip.decompress(packed) == plain and packed == again


def test_a_summary_has_a_line_for_each_list_and_loses_nothing(tmp_path):
    content = {"arms": {"ours [best]": {"error": [1.0, 0.5, 1.5], "names": ["a, b", "c"]}}, "empty": []}
    report.write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == content and any("1.0, 0.5, 1.5" in line for line in text.splitlines())


def test_arms_of_another_machine_keep_their_rows_until_their_settings_change(tmp_path):
    arms = {"ours": ("first", "model"), "none": ("as ever", "model")}
    made = [{"arm": arm, "case": i, "error": i / 2, "seen": "cat"} for arm in arms for i in range(3)]
    runs.Reported(tmp_path, "x", arms).write(made, {"arms": {}})
    assert runs.Reported(tmp_path, "x", arms).rows("ours") == made[:3]
    changed = runs.Reported(tmp_path, "x", arms | {"ours": ("second", "model")})
    assert changed.rows("ours") == [] and changed.rows("none") == made[3:]


class _Bench:
    """Makes nothing but numbers."""

    batch, settings = 2, "a model"

    def __init__(self, _options, _folder):
        pass

    def make(self, arm, some):
        return [{"case": i, "error": arm + i} for i in some], {}


def reported(monkeypatch, tmp_path, machine, *arguments, arms=None):
    """What `--report` leaves in results after a run on a machine with a state of its own."""
    monkeypatch.setattr(runs, "STATE", tmp_path / machine)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr("sys.argv", ["x", *arguments, "--report"])
    arms = arms or {"one": 1, "two": 2}
    runs.main("", "x", arms, {}, (6, 2), _Bench, lambda rows: {"arms": {}})
    rows = runs.read_rows(tmp_path / "results" / "x.csv.gz")
    return {arm: [row["error"] for row in rows if row["arm"] == arm] for arm in arms}


def test_a_report_gathers_the_arms_of_all_machines(monkeypatch, tmp_path):
    assert reported(monkeypatch, tmp_path, "a", "--arm", "one") == {"one": [1, 2, 3, 4, 5, 6], "two": []}
    both = {"one": [1, 2, 3, 4, 5, 6], "two": [2, 3, 4, 5, 6, 7]}
    assert reported(monkeypatch, tmp_path, "b", "--arm", "two") == both
    assert reported(monkeypatch, tmp_path, "c") == both, "a machine without rows of its own"
    kept = runs.Rows(tmp_path / "d" / "x" / "test", "one", (1, "a model"))
    kept.add([{"case": 0, "error": 1}], {})
    assert reported(monkeypatch, tmp_path, "d") == both, "one that was killed early"
    changed = reported(monkeypatch, tmp_path, "b", arms={"one": 1, "two": 9})
    assert changed == {"one": both["one"], "two": []}, "rows of other settings"


def test_a_report_of_some_cases_would_lose_the_others(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        reported(monkeypatch, tmp_path, "a", "--arm", "one", "--cases", "2")
    assert "--report is of all cases" in capsys.readouterr().err

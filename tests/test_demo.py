"""The main job for real, shortened: both stacks of the embedded engine, raced, recorded, judged and drawn."""

from stackrace.harness import store

SHORT = ["experiment=demo", "arrival.rate=6", "lengths.input.tokens=200", "stop.seconds=2"]
SHORT += ["warmup.requests=2", "warmup.tolerance=null"]


def test_the_demo_in_small(stackrace, tmp_path, processes_of):
    done = stackrace("bench", *SHORT)
    assert done.returncode == 0, done.stderr
    assert "[2/2] mla_mha · tiny · 6 req/s · 200 in, 24 out" in done.stderr
    runs = [store.read_run(f) for f in store.find_runs(tmp_path / "results" / "demo")]
    assert [r.status for r in runs] == ["ok"] * 2
    stacks = {}
    for run in runs:
        records = run.records
        assert run.meta["summary"]["failed"]["run"] == 0
        assert (records["prompt_tokens"] == records["asked_prompt_tokens"]).all()
        assert (records["output_tokens"] == 24).all()
        assert records["chunk_tokens"].map(sum).eq(24).all()
        assert set(records["token_source"]) == {"ids"}
        assert (records["cached_tokens"] == 0).all()
        assert run.meta["equivalence"]["verdict"] == "equal", run.meta["equivalence"]["words"]
        assert "stackrace.backends.mla.server" in run.meta["backend"]["command"]
        stacks[run.meta["point"]["stack"]] = run
    latent, expanded = stacks["mla"], stacks["mla_mha"]
    assert latent.meta["schedule"]["hash"] == expanded.meta["schedule"]["hash"]
    assert latent.meta["provenance"]["checkpoint"] == expanded.meta["provenance"]["checkpoint"]
    # greedy decoding of the same weights: the two caches must hold the same model
    same = [list(a) == list(b) for a, b in zip(latent.records.output_ids, expanded.records.output_ids, strict=True)]
    assert sum(same) >= 0.9 * len(same)
    assert processes_of() == []

    drawn = stackrace("report", "results/demo")
    assert drawn.returncode == 0, drawn.stderr
    page = (tmp_path / "results" / "demo" / "report.html").read_text()
    assert "mla_mha" in page
    assert "mla: equal, mla_mha: equal" in page

"""Secrets never reach the disk, wherever a backend's settings or its command line hold them."""

from stackrace.harness.secrets import REDACTED, public, without_secret_words


def test_settings_of_a_backend_are_redacted_at_any_depth():
    backend = {
        "env": {"HF_TOKEN": "hf_1", "VLLM_USE_V1": "1"},
        "flags": {"api-key": "sk-1", "max-num-seqs": 8, "sizes": [1, 2]},
        "python": ["docker", "run", "-e", "HF_TOKEN=hf_1", "image"],
        "extra_body": {"inner": {"secret": "s"}},
        "api_key_env": "NAME",
    }
    assert public({"seed": 1, "backend": backend}) == {
        "seed": 1,
        "backend": {
            "env": {"HF_TOKEN": REDACTED, "VLLM_USE_V1": "1"},
            "flags": {"api-key": REDACTED, "max-num-seqs": 8, "sizes": [1, 2]},
            "python": ["docker", "run", "-e", f"HF_TOKEN={REDACTED}", "image"],
            "extra_body": {"inner": {"secret": REDACTED}},
            "api_key_env": "NAME",
        },
    }


def test_words_of_a_command_line_are_redacted():
    words = ["serve", "--api-key", "sk-1", "--hf-token=hf_1", "-e", "AWS_SECRET=x", "--max-num-seqs", "8"]
    assert without_secret_words(words) == [
        *("serve", "--api-key", REDACTED, f"--hf-token={REDACTED}", "-e", f"AWS_SECRET={REDACTED}"),
        *("--max-num-seqs", "8"),
    ]

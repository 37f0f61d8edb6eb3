from avatar_core.resources import checkout, resource


def test_a_checkout_reads_its_own_files() -> None:
    root = checkout()
    assert root is not None
    assert resource("weights/registry.yaml") == root / "weights" / "registry.yaml"
    assert resource("weights/registry.yaml").is_file()

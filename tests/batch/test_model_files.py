"""Which model it is."""

from steer_server.batch.model_files import WHOLE, model_facts


def test_every_kind_of_change_is_seen(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with (folder / "weights.safetensors").open("wb") as file:
        file.truncate(WHOLE + 5)
    seen = [model_facts(str(folder))]
    assert model_facts(str(folder)) == seen[0]
    assert seen[0]["name"] == "model"

    def changed():
        facts = model_facts(str(folder))
        assert facts not in seen
        seen.append(facts)

    (folder / "config.json").write_text("[]")
    changed()
    for place in (0, WHOLE):
        with (folder / "weights.safetensors").open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        changed()
    (folder / "more.json").write_text("{}")
    changed()
    (folder / "more.json").rename(folder / "other.json")
    changed()


def test_an_id_is_its_name():
    assert model_facts("org/model") == {"name": "org/model"}

"""docs/sae-families.md is what its script makes of the loaders and fixtures."""

from sae_models.families import FAMILIES
from scripts.sae_families_doc import PAGE, page, proofs


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), "run: python -m scripts.sae_families_doc"


def test_every_family_is_proven():
    found = proofs()
    assert set(found) == {family.NAME for family in FAMILIES}
    assert [name for name, proof in found.items() if not proof.wrote and not proof.refused] == []

"""Pickled checkpoints: opened and damaged by tests, never by the server."""

import shutil

import torch

from sae_models import LoadOptions, SAEFormatError, load
from sae_models.tensor_source import LoadedTensors


def open_pickle(path):
    return LoadedTensors(path, torch.load(path, weights_only=True))


def load_pickled(location):
    """The SAE at `PATH[?OPTIONS]`, opened as the convert process opens it."""
    return load(str(location), open_pickle=open_pickle)


def damaged(checkpoint, folder, damage):
    """A copy of `checkpoint` under `folder` whose state dict went through `damage`."""
    copy = folder / checkpoint.name
    shutil.copy(checkpoint, copy)
    state = torch.load(copy, weights_only=True)
    damage(state)
    torch.save(state, copy)
    return copy


def refusal(location):
    """What the loader says, or None where it loads."""
    try:
        load_pickled(location)
    except SAEFormatError as error:
        return str(error)
    return None


def damages(state):
    """(what is wrong, a function that does it, what the error says), for every tensor that a loader needs."""
    yield "a tensor too many", lambda s: s.update(r_mag=torch.zeros(3)), "a kind of SAE that is not supported: r_mag"
    for name, tensor in state.items():
        shape = tuple(tensor.shape)
        yield f"{name} missing", lambda s, n=name: s.pop(n), f"tensor {name} is missing"
        yield f"{name} NaN", lambda s, n=name: s[n].view(-1)[-1:].fill_(torch.nan), f"{name} holds values that are not"
        yield f"{name} integers", lambda s, n=name: s.update({n: s[n].long()}), f"{name} has dtype torch.int64"
        yield f"{name} longer", lambda s, n=name: s.update({n: torch.cat([s[n], s[n]])}), " has shape "
        if len(shape) == 2:
            yield f"{name} transposed", lambda s, n=name: s.update({n: s[n].T.contiguous()}), "(it is transposed)"


def assert_every_damage_is_named(checkpoint, tensors, folder, inside="."):
    """A missing, transposed, misshapen, integer or NaN tensor, each an error that names it.

    inside: the folders around the file that say what the file does not.
    """
    state = {name: torch.load(checkpoint, weights_only=True)[name] for name in tensors}
    for number, (what, damage, says) in enumerate(damages(state)):
        place = folder / str(number) / inside
        place.mkdir(parents=True)
        message = refusal(damaged(checkpoint, place, damage))
        assert message is not None, what
        assert says in message, f"{what}: {message}"


def assert_a_server_refuses(checkpoint):
    """A pickle is not opened without an opener, and the error names the command that converts it."""
    for location in (checkpoint, checkpoint.parent):
        try:
            load(location, LoadOptions())
        except SAEFormatError as error:
            assert "is a pickle" in str(error)
            assert f"steer-server sae convert '{location}' OUT" in str(error)
        else:
            raise AssertionError(f"{location} was opened")

"""Publishing a model on the Hub: its file and a card, in one commit, after all is known to work."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from subspan import checkpoint
from subspan.checkpoint.base import class_in_transformers, say_base
from subspan.errors import SubspanError
from subspan.hub.card import make_card
from subspan.hub.client import asking, need
from subspan.hub.loading import FILE, load
from subspan.subspace.model import SubspaceModel


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    base: str | None = None,
    scores: Mapping[str, float] | None = None,
    card: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload coordinates",
) -> str:
    """Publish a model's coordinates on the Hugging Face Hub, as one file and a card.

    Of a network of Transformers the file names the base, so that ``subspan.load(repo_id)`` is
    enough to have the model again. This is tried here before anything is uploaded, which loads the
    base once more.

    Args:
        model: a :class:`SubspaceModel`, or the network in it.
        repo_id: the repository (``"user/name"``), which is made if there is none.
        base: the repository that the network came from, as ``NAME`` or ``NAME@REVISION``; by
            default the one that Transformers loaded it from.
        scores: of the model, by name, for the card and the file.
        card: further metadata of the card: ``{"license": "apache-2.0", "datasets": [...]}``.
        extra: JSON values for the file, as for :func:`save`.
        private: whether a new repository is private.
        token: with the right to write; by default that of `hf auth login`.
        revision: the branch to commit to.
        create_pr: whether to propose the commit as a pull request.
        commit_message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        SubspanError: if the model could not be loaded again from what would be uploaded, if the
            network was loaded from a folder and ``base`` does not say where others find it, or if
            the Hub refuses; nothing has been uploaded then.
    """
    found = SubspaceModel.of(model)
    if found is None:
        raise SubspanError(
            f"a {type(model).__name__} is in no subspace and has no coordinates to publish: wrap "
            "it by SubspaceModel, or use the network's own push_to_hub"
        )
    for what, value in (("scores", scores), ("card", card), ("extra", extra)):
        if not isinstance(value, Mapping | None):
            raise SubspanError(f"{what} must have a name for each value, as a dict, got {value!r}")
    if "/" not in repo_id:
        raise SubspanError(f"{repo_id!r} does not say whose the repository is: give USER/NAME")
    hub = need("huggingface_hub")
    if base is not None:
        name, _, at = base.partition("@")
        with asking(name, at or None):  # from where its configuration is read
            hub.hf_hub_download(name, "config.json", revision=at or None, token=token)
    header, tensors = checkpoint.contents(
        found, {**(extra or {}), **({"scores": dict(scores)} if scores else {})}, base
    )
    data = checkpoint.to_bytes(header, tensors)
    _check(found, header, data, token)
    with asking(repo_id, revision):
        existing = _existing_card(hub, repo_id, revision, token)
    text = make_card(repo_id, header, tensors, len(data), card or {}, existing)
    files = {FILE: data, "README.md": text.encode()}
    with asking(repo_id, revision):
        api = hub.HfApi(token=token, library_name="subspan")
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            [hub.CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    return str(commit.commit_url)


def _check(model: SubspaceModel, header: Mapping[str, Any], data: bytes, token: str | None) -> None:
    """Refuse what nobody could load as the card will say."""
    base = header.get("base")
    if base is None:
        if model.init_seed is None and class_in_transformers(model.body) is not None:
            raise SubspanError(
                "the network does not say which repository it was loaded from, or parts of it were "
                "replaced since: give push_to_hub base='user/name' (or 'user/name@revision')"
            )
        return  # whoever loads it gives the network, as the card says
    if "folder" in base:
        raise SubspanError(
            f"the network was loaded from {base['folder']}, a folder that others do not have: give "
            "push_to_hub base='user/name', the repository with the same weights"
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / FILE
        file.write_bytes(data)
        try:
            load(file, token=token)
        except SubspanError as error:
            text = str(error).replace(str(file), "the file")
            raise SubspanError(
                f"nothing was published, for {say_base(base)} does not give this model again "
                f"(base='NAME@REVISION' names another): {text}"
            ) from None


def _existing_card(hub: Any, repo: str, revision: str | None, token: str | None) -> str | None:
    """Return the card of a repository, if there are both."""
    errors = hub.errors
    try:
        file = hub.hf_hub_download(repo, "README.md", revision=revision, token=token)
    except errors.GatedRepoError:
        raise
    except (errors.RemoteEntryNotFoundError, errors.RepositoryNotFoundError):
        return None
    return Path(file).read_text(encoding="utf-8")

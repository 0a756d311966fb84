"""Upload of a finished folder to the hub."""

from __future__ import annotations

import re
from pathlib import Path


def refuse_upload(repo: str) -> None:
    """Raise an error, before work starts, for a name the hub does not take, or a token that may not write there.

    Raises
    ------
    ValueError
        for a name that is none, without a token, and for an account or organisation that the token is not part of.
    ConnectionError
        when the hub is not in reach, or does not know the token.
    """
    from huggingface_hub import HfApi, get_token

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"--push-to-hub {repo}: give the name of a repository on the hub, ORG/NAME")
    if not get_token():
        raise ValueError(f"--push-to-hub {repo}: no token; log in once with: hf auth login, or set HF_TOKEN")
    try:
        who = HfApi().whoami()
    except Exception as error:  # the hub's client raises many kinds
        raise ConnectionError(f"--push-to-hub {repo}: the hub did not take the token: {error}\nGo online, log in with: "
                              f"hf auth login; or leave the option out and upload later with: hf upload") from error
    places = [who["name"], *(entry["name"] for entry in who.get("orgs") or [])]
    if repo.partition("/")[0] not in places:
        raise ValueError(f"--push-to-hub {repo}: your token belongs to {', '.join(places)}; give one of them before "
                         f"the slash")


def upload(folder: Path, repo: str) -> str:
    """Upload everything in ``folder`` to the repository ``repo``, made private if it is new; return its address.

    Raises
    ------
    ConnectionError
        when the hub does not take it.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repo, commit_message="Pruned with pruning_lib")
    except Exception as error:  # the hub's client raises many kinds
        raise ConnectionError(f"{repo}: {error}") from error
    return str(address)

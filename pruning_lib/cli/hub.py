"""Upload of a finished folder to the hub."""

from __future__ import annotations

import re
from pathlib import Path


def refuse_upload(repo: str) -> None:
    """Raise ValueError, before work starts, for a name the hub does not take, or without a token."""
    from huggingface_hub import get_token

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"--push-to-hub {repo}: give the name of a repository on the hub, ORG/NAME")
    if not get_token():
        raise ValueError(f"--push-to-hub {repo}: no token; log in once with: hf auth login, or set HF_TOKEN")


def upload(folder: Path, repo: str) -> str:
    """Upload everything in ``folder`` to the repository ``repo``, made private if it is new; return its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    address = api.create_repo(repo, private=True, exist_ok=True)
    api.upload_folder(folder_path=folder, repo_id=repo, commit_message="Pruned with pruning_lib")
    return str(address)

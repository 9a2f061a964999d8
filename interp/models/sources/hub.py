"""A hub id, through the ordinary loaders; the hub is asked first, so that mistakes cost seconds.

A machine without network uses what is in the hub's local cache at once, where the loaders would
wait through half a minute of retries.
"""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from typing import Any

from interp.errors import BadInput
from interp.models.sources import embedded
from interp.models.sources.base import Loaded
from interp.models.sources.folder import read_config
from interp.models.sources.pretrained import check_config, load_module, load_tokenizer, one_line

_WITHOUT_HUB = f"give a local folder, a .gguf file or '{embedded.NAME}'"


def load_hub(
    repo: str, *, tokenizer: Any, revision: str | None, trust_remote_code: bool, **options: Any
) -> Loaded:
    """The model of a hub repository at a branch, tag or commit."""
    cached_only = not reachable(repo, revision)
    where = {"revision": revision or "main", "local_files_only": cached_only}
    config_file = config_file_of(repo, where)
    config = read_config(config_file, repo)
    code = {"trust_remote_code": trust_remote_code}
    check_config(config, shown=repo, **code)
    module, notes = load_module(repo, config, shown=repo, **code, **where, **options)
    if tokenizer is None:
        try:
            tokenizer = load_tokenizer(repo, shown=repo, **code, **where)
        except BadInput as error:  # vision models have none; whoever needs one says so
            notes = (*notes, f"no tokenizer: {error}")
    if cached_only:
        notes = (*notes, "the hub was not reached: this is the copy in its local cache")
    # The cache keeps a commit's files in snapshots/<commit>/.
    commit = config_file.parent.name if config_file.parent.parent.name == "snapshots" else None
    name = f"{repo}@{revision}" if revision else repo
    return Loaded(module, tokenizer, name, "hub", commit=commit, notes=notes)


def cached_repos() -> dict[str, int]:
    """The model repositories in the hub's local cache, with their size in bytes."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, OSError):
        return {}
    return {
        repo.repo_id: repo.size_on_disk
        for repo in sorted(repos, key=lambda r: r.repo_id)
        if repo.repo_type == "model"
    }


def not_found(name: str) -> BadInput:
    """The error for a name that is no model anywhere, with the nearest one known here."""
    near = difflib.get_close_matches(
        name.lower(), [embedded.NAME, *cached_repos()], n=1, cutoff=0.7
    )
    hint = f"did you mean '{near[0]}'?" if near else "`interp models` lists what can be given"
    return BadInput(
        f"no model '{name}': no such file or folder, nor a hub model seen from here; {hint}"
    )


def reachable(repo: str, revision: str | None) -> bool:
    """Whether the hub answers; what it says against this repository is raised at once."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if constants.is_offline_mode():
        return False
    try:
        HfApi().model_info(repo, revision=revision, timeout=10)
    except HFValidationError as error:
        raise not_found(repo) from error
    except RevisionNotFoundError as error:
        raise _no_revision(repo, revision) from error
    except RepositoryNotFoundError as error:
        raise not_found(repo) from error
    except (OfflineModeIsEnabled, HfHubHTTPError, OSError, _transport_error()):
        return False
    return True


def _transport_error() -> type[Exception]:
    """What a failed connection raises in the HTTP client that huggingface_hub was built with."""
    from huggingface_hub import get_session

    client = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    return getattr(client, "TransportError", OSError)


def config_file_of(repo: str, where: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    with one_line(repo):
        try:
            return Path(hf_hub_download(repo, "config.json", **where))
        except GatedRepoError as error:
            raise BadInput(
                f"'{repo}' is gated; accept its terms on its hub page, then run `hf auth login`"
            ) from error
        except RevisionNotFoundError as error:
            raise _no_revision(repo, where["revision"]) from error
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise not_found(repo) from error
        except LocalEntryNotFoundError as error:
            if repo in cached_repos() and where["revision"] != "main":
                raise _no_revision(repo, where["revision"], " in the local cache") from error
            near = difflib.get_close_matches(
                repo.lower(), [embedded.NAME, *cached_repos()], n=1, cutoff=0.7
            )
            hint = f"did you mean '{near[0]}'? or " if near else ""
            raise BadInput(
                f"'{repo}' is no file or folder here, and the hub cannot be reached; "
                f"{hint}{_WITHOUT_HUB}"
            ) from error
        except EntryNotFoundError as error:
            raise BadInput(
                f"'{repo}' has no config.json; wanted a transformers checkpoint: "
                "give another repository, or download its .gguf file and give that"
            ) from error


def _no_revision(repo: str, revision: str | None, where: str = "") -> BadInput:
    return BadInput(
        f"'{repo}' has no revision '{revision}'{where}; give a branch, tag or commit of it, or none"
    )

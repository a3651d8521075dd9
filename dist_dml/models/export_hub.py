"""An export on the Hugging Face hub, by the user's own token."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dist_dml.credentials import redact
from dist_dml.errors import RunError, UsageError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def check_hub(name: str) -> None:
    """Refuse, before any work, a push that cannot succeed.

    Raises:
        UsageError: the name is not OWNER/NAME, no token is set, or the library is absent.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"--push-to-hub {name!r}: expected OWNER/NAME of letters, digits, '-', '_' and '.', "
            "for example ann/shoes"
        )
    if not os.environ.get("HF_TOKEN"):
        raise UsageError(
            "--push-to-hub needs a token with the right to write, and the environment variable "
            "HF_TOKEN is not set; make one at https://huggingface.co/settings/tokens and export it"
        )
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise UsageError(
            "--push-to-hub needs huggingface_hub, which is not installed; run "
            "`pip install huggingface_hub`"
        ) from None


def push_to_hub(folder: Path, name: str, private: bool, message: str) -> str:
    """Upload all files of an export as one commit. Returns its page.

    The token is `HF_TOKEN` of the environment: it is sent, and neither printed nor stored. The
    server is the hub, or `HF_ENDPOINT`. Files that are there already and unchanged are not sent.

    Args:
        folder: of the export.
        name: OWNER/NAME; made where there is none.
        private: for a repository that is made now. Without it the hub's default is public.
        message: of the commit.

    Raises:
        UsageError: the hub refuses token or name.
        RunError: it does not answer, or gave up.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi(token=os.environ["HF_TOKEN"], endpoint=os.environ.get("HF_ENDPOINT") or None)
    try:
        # None, not False: an organisation may have private as its default.
        api.create_repo(name, private=private or None, exist_ok=True)
        done = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
        return str(done.commit_url)
    except OfflineModeIsEnabled:
        raise UsageError(
            "--push-to-hub: HF_HUB_OFFLINE is set, which forbids it; unset it"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise UsageError(
                f"the hub refuses HF_TOKEN for {name} (HTTP {status}); expected a token with the "
                "right to write there"
            ) from None
        raise _unanswered(api.endpoint, folder, error) from None
    except Exception as error:  # The client's transport has errors of its own.
        raise _unanswered(api.endpoint, folder, error) from None


def _unanswered(endpoint: str, folder: Path, error: Exception) -> RunError:
    reason = " ".join(redact(str(error)).split())[:200] or type(error).__name__
    return RunError(
        f"the hub at {redact(endpoint)} did not take the model ({reason}); the export is complete "
        f"in {folder}; repeat with another --out when it answers"
    )

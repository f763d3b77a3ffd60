"""Turn errors of obstore into OSErrors with a fix."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from hmil_fast.errors import StoreError
from hmil_fast.io.store.location import ObjectUrl

_FIXES = {
    r"NoSuchBucket|ContainerNotFound|bucket does not exist": (
        "Create the bucket, or correct its name."
    ),
    r"169\.254\.|/latest/api/token|Missing AccessKeyId|Missing SecretAccessKey|Account must be": (
        "Set credentials in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; "
        "GOOGLE_APPLICATION_CREDENTIALS; AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY)."
    ),
    r"AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|Forbidden|Unauthorized": (
        "Check that the credentials in the environment are valid and may read, write, list and "
        "delete there."
    ),
    r"builder error": "Set AWS_ALLOW_HTTP=true for an endpoint without TLS.",
    r"as boolean": "Set AWS_ALLOW_HTTP to true or false, or unset it.",
}
FIX = "Check the network, AWS_ENDPOINT_URL and AWS_REGION; then run the same command again."


class ObjectError(OSError):
    """What an object store or the way to it refused, in one line, with a fix."""

    def __init__(self, reason: str, path: ObjectUrl, fix: str) -> None:
        super().__init__(errno.EIO, reason, str(path))
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.strerror} ({self.filename})"


@contextmanager
def explained(path: ObjectUrl, *expected: type[Exception]) -> Iterator[None]:
    """Turn obstore's errors into OSErrors; what is not there is a FileNotFoundError."""
    from obstore.exceptions import BaseError

    try:
        yield
    except expected:
        raise
    except BaseException as error:
        # the last is a panic in Rust, of a class that is no Exception and cannot be imported
        ours = isinstance(error, (BaseError, FileNotFoundError, PermissionError))
        if not ours and type(error).__name__ != "PanicException":
            raise
        text = str(error)
        if isinstance(error, FileNotFoundError) and not re.search("NoSuchBucket", text):
            raise FileNotFoundError(errno.ENOENT, "there is no such object", str(path)) from error
        said = re.search(r"<Code>(.*?)</Code>\s*<Message>(.*?)</Message>", text, re.DOTALL)
        reason = ": ".join(said.groups()) if said else text.splitlines()[0][:300]
        fixes = (fix for pattern, fix in _FIXES.items() if re.search(pattern, text))
        raise ObjectError(reason, path, next(fixes, FIX)) from error


def failed(error: OSError, doing: str, path: ObjectUrl) -> StoreError:
    """A StoreError that names the URL and the reason."""
    return StoreError(
        f"{doing} failed at {path}: {error.strerror or error}", getattr(error, "fix", FIX)
    )

"""What went wrong with a request to S3, and whether another attempt can help.

Used by `s3_storage.py` alone. What boto3 raises becomes a `Failure`, whose text has the status,
S3's code and its message, and nothing of the rest of an answer: there S3 repeats the access key
and what was signed.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    MetadataRetrievalError,
)

# What may pass, among what boto3 raises without an answer; the rest is a matter of set-up.
PASSING_ERRORS = (
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    MetadataRetrievalError,
)
KEYS_REMEDY = "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile in AWS_PROFILE."
TOKEN_REMEDY = "Get new credentials, AWS_SESSION_TOKEN too, and run again."
REGION_REMEDY = "Set region to that of the bucket, and check endpoint_url."
# S3's code: what is wrong, what to do.
SETUP_MISTAKES = {
    "NoSuchBucket": ("no such bucket", "Check its name, and that endpoint_url is its service."),
    "InvalidBucketName": ("not a name for a bucket", "Give the name alone, without s3://."),
    "AllAccessDisabled": ("the bucket is closed", "Ask its owner."),
    "InvalidAccessKeyId": ("the access key is not known there", KEYS_REMEDY),
    "SignatureDoesNotMatch": ("the secret key does not fit the access key", KEYS_REMEDY),
    "InvalidToken": ("the session token is not valid", TOKEN_REMEDY),
    "InvalidClientTokenId": ("the access key is not known there", KEYS_REMEDY),
    "ExpiredToken": ("the credentials have expired", TOKEN_REMEDY),
    "TokenRefreshRequired": ("the credentials have expired", TOKEN_REMEDY),
    "RequestTimeTooSkewed": ("this machine's clock is wrong", "Set it, best by NTP."),
    "AuthorizationHeaderMalformed": ("wrong region", REGION_REMEDY),
    "IllegalLocationConstraintException": ("wrong region", REGION_REMEDY),
    "PermanentRedirect": ("wrong region", REGION_REMEDY),
    "301": ("wrong region", REGION_REMEDY),
}
PASSING_CODES = ("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException")
PASSING_STATUSES = (408, 429)


class Failure(NamedTuple):
    """`passing`: another attempt may succeed. `changed`: the object was replaced meanwhile."""

    kind: Literal["setup", "passing", "vanished", "denied", "beyond_end", "changed", "failed"]
    status: int | None  # None: no answer
    code: str
    text: str


def diagnose(error: Exception) -> Failure:
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        answer = error.response.get("Error", {})
        return _classify(status, str(answer.get("Code", "")), str(answer.get("Message", "")))
    if isinstance(error, BotoCoreError) and not isinstance(error, PASSING_ERRORS):
        return Failure("setup", None, "", str(error))
    return Failure("passing", None, "", str(error).strip() or type(error).__name__)


def _classify(status: int | None, code: str, message: str) -> Failure:
    text = ", ".join(part for part in (str(status or ""), code, message) if part and part != "0")
    if code in SETUP_MISTAKES:
        kind = "setup"
    elif status is None or status >= 500 or status in PASSING_STATUSES or code in PASSING_CODES:
        kind = "passing"
    else:
        # A body is missing in some answers, so that the status must do.
        kinds = {401: "denied", 403: "denied", 404: "vanished", 412: "changed", 416: "beyond_end"}
        kind = kinds.get(status, "failed")
    return Failure(kind, status, code, text)  # pyright: ignore[reportArgumentType]


def describe_setup_mistake(failure: Failure) -> str:
    """Says what is wrong and what to do when a listing failed, or when all requests will fail."""
    if failure.code in SETUP_MISTAKES:
        wrong, remedy = SETUP_MISTAKES[failure.code]
        return f"{wrong} ({failure.text}). {remedy}"
    if failure.kind == "denied":
        return (
            f"no permission to list the bucket ({failure.text}). Give these credentials "
            "s3:ListBucket and s3:GetObject on it, or use others."
        )
    if failure.kind == "vanished":
        return f"not found ({failure.text}). Check bucket and endpoint_url."
    return f"{failure.text}. Check bucket, region, endpoint_url and credentials."

"""S3: mistakes of set-up, each in one clear message, and which credentials are used."""

from __future__ import annotations

import logging
import socket
import traceback

import pytest

from longcat_video_fft.storage import s3_storage
from longcat_video_fft.storage.s3_storage import S3Options, open_s3
from longcat_video_fft.storage.storage import StorageError
from tests.longcat_video_fft.conftest import VIDEOS, open_films
from tests.longcat_video_fft.support.s3_server import (
    ACCESS_KEY_ID,
    SECRET_ACCESS_KEY,
    SLOW_DOWN,
    Fault,
    FaultyProxy,
    connect,
    put_objects,
)


@pytest.mark.usefixtures("s3_environment")
def test_missing_bucket(s3_url: str) -> None:
    with pytest.raises(ValueError, match=r"s3://nowhere.*no such bucket") as caught:
        open_s3(S3Options(bucket="nowhere", endpoint_url=s3_url))
    assert s3_url in str(caught.value)


@pytest.mark.usefixtures("s3_environment")
def test_bucket_that_goes_while_it_is_read(s3_url: str) -> None:
    put_objects(s3_url, "going", {"a.mp4": b"a"})
    storage = open_s3(S3Options(bucket="going", endpoint_url=s3_url))
    connect(s3_url).delete_object(Bucket="going", Key="a.mp4")
    connect(s3_url).delete_bucket(Bucket="going")
    with pytest.raises(ValueError, match="no such bucket"):
        storage.read("a.mp4")


@pytest.mark.usefixtures("s3_bucket", "s3_environment")
@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
        (400, "ExpiredToken", "expired"),
        (400, "AuthorizationHeaderMalformed", "region"),
    ],
)
def test_wrong_credentials(faulty_proxy: FaultyProxy, status: int, code: str, message: str) -> None:
    extra = f"<AWSAccessKeyId>{ACCESS_KEY_ID}</AWSAccessKeyId><StringToSign>s</StringToSign>"
    fault = Fault(status=status, code=code, extra=extra)
    faulty_proxy.add("list-type", fault)
    with pytest.raises(ValueError, match=message) as at_once:
        open_films(faulty_proxy.url, VIDEOS)
    storage = open_films(faulty_proxy.url, VIDEOS)  # the fault is used up
    faulty_proxy.add("a.mp4", fault)
    with pytest.raises(ValueError, match=message) as later:
        storage.read("a.mp4")
    assert faulty_proxy.count("a.mp4") == 1
    for caught in (at_once, later):
        assert "s3://films" in str(caught.value)
        shown = "".join(traceback.format_exception(caught.value))
        assert ACCESS_KEY_ID not in shown
        assert SECRET_ACCESS_KEY not in shown


@pytest.mark.usefixtures("s3_bucket", "s3_environment")
def test_wrong_region(faulty_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"x-amz-bucket-region": "eu-west-3"}
    redirect = Fault(status=301, code="PermanentRedirect", headers=there)
    faulty_proxy.add("list-type", redirect, times=2)
    with pytest.raises(ValueError, match="wrong region"):
        open_films(faulty_proxy.url, VIDEOS)
    # Amazon's answer where boto3 has followed the bucket to its region by itself.
    faulty_proxy.add("list-type", Fault(headers=there), times=9)
    monkeypatch.setattr(s3_storage, "AWS_HOST", "127.0.0.1")
    with pytest.raises(ValueError, match="Set region to eu-west-3"):
        open_films(faulty_proxy.url, VIDEOS)


@pytest.mark.usefixtures("s3_bucket", "s3_environment")
def test_no_permission(faulty_proxy: FaultyProxy) -> None:
    denied = Fault(status=403, code="AccessDenied")
    faulty_proxy.add("list-type", denied)
    with pytest.raises(ValueError, match="permission to list"):
        open_films(faulty_proxy.url, VIDEOS)
    storage = open_films(faulty_proxy.url, VIDEOS)
    faulty_proxy.add("a.mp4", denied)
    with pytest.raises(StorageError, match=r"a\.mp4: access denied"):
        storage.read("a.mp4")
    assert storage.read("a.mp4") == b"0123456789"


@pytest.mark.usefixtures("s3_bucket", "s3_environment")
def test_no_credentials_at_all(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ValueError, match=r"no credentials.*AWS_ACCESS_KEY_ID"):
        open_films(s3_url, VIDEOS)
    with pytest.raises(ValueError, match="both"):
        open_films(s3_url, VIDEOS, access_key_id="AKIAOFTHEFILE")


@pytest.mark.usefixtures("s3_bucket", "s3_environment")
def test_environment_wins_over_the_options_keys(
    faulty_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"access_key_id": "AKIAOFTHEFILE", "secret_access_key": "secret-of-the-file"}
    assert open_films(faulty_proxy.url, VIDEOS, **keys).read("a.mp4") == b"0123456789"
    signed = [request.headers["authorization"] for request in faulty_proxy.requests]
    assert len(signed) == 2  # the check and the read
    assert all(f"Credential={ACCESS_KEY_ID}/" in header for header in signed)

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert open_films(faulty_proxy.url, VIDEOS, **keys).read("a.mp4") == b"0123456789"
    signed = [request.headers["authorization"] for request in faulty_proxy.requests[2:]]
    assert len(signed) == 2
    assert all("Credential=AKIAOFTHEFILE/" in header for header in signed)


@pytest.mark.usefixtures("s3_bucket", "s3_environment")
def test_session_token_and_region_go_with_each_request(
    faulty_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-of-the-session")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")  # the option wins
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")  # known to other clients alone
    open_films(faulty_proxy.url, VIDEOS, region="eu-south-2").read("a.mp4")
    assert len(faulty_proxy.requests) == 2
    for request in faulty_proxy.requests:
        assert request.headers["x-amz-security-token"] == "token-of-the-session"
        assert "/eu-south-2/s3/" in request.headers["authorization"]


@pytest.mark.usefixtures("s3_environment")
def test_unreachable_endpoint(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="longcat_video_fft")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"  # bound, but nothing listens
        with pytest.raises(ValueError, match="cannot be reached") as caught:
            open_films(url, VIDEOS)
    assert url in str(caught.value)
    assert "attempt 2 failed" in caplog.text
    assert "attempt 3 failed" not in caplog.text  # it is not tried as often as later requests


@pytest.mark.usefixtures("s3_environment")
@pytest.mark.parametrize("url", ["films.example", "ftp://host", "http://user:hidden@127.0.0.1"])
def test_endpoint_that_is_no_address(url: str) -> None:
    with pytest.raises(ValueError, match="endpoint_url") as caught:
        open_films(url, VIDEOS)
    assert "hidden" not in str(caught.value)


@pytest.mark.usefixtures("s3_environment")
def test_name_that_is_no_bucket(s3_url: str) -> None:
    for bucket in ("", "s3://films"):
        with pytest.raises(ValueError, match="bucket"):
            open_s3(S3Options(bucket=bucket, endpoint_url=s3_url))


@pytest.mark.usefixtures("s3_bucket", "s3_environment")
def test_no_secret_is_shown(
    faulty_proxy: FaultyProxy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG, logger="longcat_video_fft")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    keys = {"access_key_id": "AKIAOFTHEFILE", "secret_access_key": "secret-of-the-file"}
    faulty_proxy.add("a.mp4", SLOW_DOWN, times=100)
    with pytest.raises(StorageError) as caught:
        open_films(faulty_proxy.url, VIDEOS, **keys).read("a.mp4")
    shown = caplog.text + str(caught.value) + repr(S3Options(bucket="films", **keys))
    assert "attempt 7 failed" in shown
    assert "AKIAOFTHEFILE" not in shown
    assert "secret-of-the-file" not in shown


@pytest.mark.usefixtures("s3_bucket", "s3_environment")
def test_an_older_choice_of_client_is_reported_to_do_nothing(
    s3_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_films(s3_url, VIDEOS)
    assert not caplog.text
    monkeypatch.setenv("LONGCAT_NO_OBSTORE", "1")
    assert open_films(s3_url, VIDEOS).read("a.mp4") == b"0123456789"
    assert caplog.text.count("LONGCAT_NO_OBSTORE no longer does anything") == 1

"""Makes the metadata table of a bucket or folder from headers alone; run again, it continues.

    python generate_metadata_parquet.py --bucket B --prefix videos/ --output ../metadata.parquet \
        --region us-east-1 --workers 32
    python generate_metadata_parquet.py --folder /mnt/nvme/data/videos --output ../metadata.parquet

A row a video: filename (with its sub-folders), caption (all lines), width, height, rotation, fps,
duration, num_frames, codec, size, and for a video that cannot be used error and message. Keys come
from the environment or wherever the AWS tools look for them.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from pathlib import Path

if __package__ in (None, ""):  # run as a script, from anywhere
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pyarrow.parquet as pq
from tqdm.contrib.logging import logging_redirect_tqdm

from longcat_video_fft.media.bad_video import REASONS
from longcat_video_fft.precompute.metadata import WORKERS, build_table
from longcat_video_fft.storage.s3_storage import S3Options, open_s3
from longcat_video_fft.storage.storage import LocalStorage, Storage

logger = logging.getLogger("longcat_video_fft")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--bucket", help="S3 bucket")
    source.add_argument("--folder", type=Path, help="a local folder in place of a bucket")
    parser.add_argument("--prefix", default="", help="where in the bucket")
    parser.add_argument("--output", type=Path, required=True, help="the parquet file to make")
    parser.add_argument("--region", help="the bucket's region")
    parser.add_argument("--endpoint-url", help="for R2, MinIO and others")
    parser.add_argument("--workers", type=int, default=WORKERS, help="requests in flight")
    parser.add_argument(
        "--no-captions", action="store_true", help="do not read .txt files; the column stays empty"
    )
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers={args.workers}: must be 1 or more")
    return args


def open_source(args: argparse.Namespace) -> Storage:
    if args.folder is not None:
        return LocalStorage(args.folder)
    options = S3Options(
        bucket=args.bucket,
        prefix=args.prefix,
        region=args.region,
        endpoint_url=args.endpoint_url,
    )
    return open_s3(options, num_connections=args.workers)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("botocore").setLevel(logging.WARNING)
    try:
        with logging_redirect_tqdm():
            output = build_table(
                open_source(args),
                args.output,
                reads_captions=not args.no_captions,
                workers=args.workers,
            )
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    errors = Counter(pq.read_table(output, columns=["error"])["error"].to_pylist())
    logger.info("%s: %d rows, %d without a fault", output, errors.total(), errors.pop("", 0))
    for reason, number in errors.most_common():
        logger.warning("%d %s (%s)", number, reason, REASONS.get(reason, reason))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Check a dataset and say what it holds: classes, counts, sizes, mean and deviation, unreadable files."""

import os

from wmdd_core.artifacts import write_json
from wmdd_core.data import describe
from wmdd_core.digests import digest
from workflow_scripts.job import Job, run


def main(job: Job) -> None:
    download = os.environ.get("WMDD_DOWNLOAD") == "1"
    description = describe({**job.settings, "download": download}, workers=job.threads)
    header = job.header()
    # What follows depends on what was found, not only on where it was looked for.
    header["lineage"][job.rule] = digest([header["lineage"][job.rule], description])
    write_json(job.output["description"], description, header)
    for split in ("train", "test"):
        print(f"{split}: {description[split]['count']} images in {len(description['classes'])} classes")
    for line in description["warnings"]:
        print(f"warning: {line}")


if __name__ == "__main__":
    run(main)

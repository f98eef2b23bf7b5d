"""Decode a split once, resized and centre-cropped, into one memory-mapped file of uint8."""

from wmdd_core.data import decode_to
from wmdd_core.sources import open_described
from workflow_scripts.job import Job, run


def main(job: Job) -> None:
    source = open_described(job.description(), job.wildcards["split"], job.input["description"])
    decode_to(job.output["images"], source, job.settings["resolution"], workers=job.threads)
    print(f"{len(source)} images of {job.settings['resolution']} pixels")


if __name__ == "__main__":
    run(main)

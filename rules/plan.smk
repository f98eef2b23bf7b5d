"""At the end: what the jobs of a dry run will cost, and what a run could not check.

Snakemake has no hook there, but Python has.
"""

import atexit

from snakemake.settings.types import Quietness

from rules.plan import summarise

_working_folder = os.getcwd()  # which Snakemake has left when Python ends


def planned_jobs():
    """(rule, wildcards) of the jobs that a dry run has planned; targets, which do nothing, are none."""
    jobs = workflow.dag.needrun_jobs(exclude_finished=False)
    return [(j.rule.name, dict(j.wildcards_dict)) for j in jobs if j.rule.shellcmd]


def print_plan():
    """Print the plan to where Snakemake writes, once a dry run has come to its end."""
    quiet = Quietness.ALL in (workflow.output_settings.quiet or ())
    if workflow.dryrun and not quiet and workflow.dag and (jobs := planned_jobs()):
        here = {**config, "results": os.path.join(_working_folder, RESULTS)}
        print(summarise(jobs, here, read_yaml("report/costs.yaml")), file=sys.stderr)


def print_unrecorded():
    """Say in the end that Snakemake took files as they are because it does not know what made them."""
    if workflow.dag is None or not workflow.is_main_process:
        return
    dag, record = workflow.dag, workflow.persistence
    lost = [
        job
        for job in dag.jobs
        if dag.reason(job).no_metadata
        and not dag.needrun(job)
        and not record.has_metadata(job)
        and all(os.path.exists(os.path.join(_working_folder, file)) for file in job.output)
    ]
    if lost:
        print(
            f"warning: {len(lost)} job{'s' * (len(lost) > 1)} left files without a record of their settings (results"
            " copied without .snakemake?); a change of settings will not rerun them: if there was one, delete the"
            " files, or add -R and the names of the rules",
            file=sys.stderr,
        )


atexit.register(print_plan)
atexit.register(print_unrecorded)

"""After a dry run: what the planned jobs will cost. Snakemake has no hook there, but Python has."""

import atexit

from snakemake.settings.types import Quietness

from rules.plan import summarise


def planned_jobs():
    """(rule, wildcards) of the jobs that a dry run has planned; targets, which do nothing, are none."""
    jobs = workflow.dag.needrun_jobs(exclude_finished=False)
    return [(j.rule.name, dict(j.wildcards_dict)) for j in jobs if j.rule.shellcmd]


def print_plan():
    """Print the plan to where Snakemake writes, once a dry run has come to its end."""
    quiet = Quietness.ALL in (workflow.output_settings.quiet or ())
    if workflow.dryrun and not quiet and workflow.dag and (jobs := planned_jobs()):
        print(summarise(jobs, config, read_yaml("report/costs.yaml")), file=sys.stderr)


atexit.register(print_plan)

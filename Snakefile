"""WMDD, dataset distillation via the Wasserstein metric, from raw images to the paper's tables."""

from snakemake.utils import min_version

min_version("9.0")


configfile: f"{workflow.basedir}/config.yaml"


include: "rules/common.smk"
include: "rules/inputs.smk"
include: "rules/report_inputs.smk"
include: "rules/data.smk"
include: "rules/pretrain.smk"
include: "rules/features.smk"
include: "rules/barycenter.smk"
include: "rules/recover.smk"
include: "rules/relabel.smk"
include: "rules/evaluate.smk"
include: "rules/report.smk"
include: "rules/analysis.smk"
include: "rules/tables.smk"
include: "rules/plan.smk"


rule all:
    default_target: True
    input:
        PAGE.format(page="index"),
        lambda w: target_files(page_names("index")),  # what was deleted is made again, too

"""Tables beside those of accuracy: time and memory (Table 7), cost, hyperparameters (Table 6)."""

# ---- efficiency ------------------------------------------------------------------------------


rule measure_efficiency:
    input:
        unpack(measure_efficiency_input),
    output:
        csv=report(
            TABLE.format(table="{figure}.csv"),
            category="Tables",
            caption="../report/figure.rst",
            labels={"table": "{figure}", "format": "CSV"},
        ),
        md=TABLE.format(table="{figure}.md"),
        tex=TABLE.format(table="{figure}.tex"),
    log:
        log_of("measure_efficiency", "{figure}"),
    benchmark:
        benchmark_of("measure_efficiency", "{figure}")
    wildcard_constraints:
        figure=figures_of_kind("efficiency"),
    conda:
        "../envs/wmdd.yaml"
    # Time and memory mean something only if no other job shares the machine, so this one takes all cores.
    threads: every_core
    resources:
        local_gpu=local_gpu,
    params:
        settings=settings_of("measure_efficiency"),
        code=code_of("measure_efficiency"),
        job=describe_job,
    message:
        "Table {wildcards.figure}: time and memory, alone on the machine"
    shell:
        run_script("measure_efficiency")


# ---- cost ------------------------------------------------------------------------------------


rule tabulate_cost:
    input:
        unpack(tabulate_cost_input),
    output:
        csv=report(
            TABLE.format(table="{figure}.csv"),
            category="Tables",
            caption="../report/figure.rst",
            labels={"table": "{figure}", "format": "CSV"},
        ),
        md=TABLE.format(table="{figure}.md"),
        tex=TABLE.format(table="{figure}.tex"),
    log:
        log_of("tabulate_cost", "{figure}"),
    benchmark:
        benchmark_of("tabulate_cost", "{figure}")
    wildcard_constraints:
        figure=figures_of_kind("cost"),
    conda:
        "../envs/wmdd.yaml"
    params:
        settings=settings_of("tabulate_cost"),
        code=code_of("tabulate_cost"),
        job=describe_job,
    message:
        "Table {wildcards.figure}"
    shell:
        run_script("tabulate_cost")


# ---- hyperparameters -------------------------------------------------------------------------


rule tabulate_hyperparameters:
    output:
        csv=report(
            TABLE.format(table="{figure}.csv"),
            category="Tables",
            caption="../report/figure.rst",
            labels={"table": "{figure}", "format": "CSV"},
        ),
        md=TABLE.format(table="{figure}.md"),
        tex=TABLE.format(table="{figure}.tex"),
    log:
        log_of("tabulate_hyperparameters", "{figure}"),
    benchmark:
        benchmark_of("tabulate_hyperparameters", "{figure}")
    wildcard_constraints:
        figure=figures_of_kind("hyperparameters"),
    conda:
        "../envs/wmdd.yaml"
    params:
        settings=settings_of("tabulate_hyperparameters"),
        code=code_of("tabulate_hyperparameters"),
        job=describe_job,
    message:
        "Table {wildcards.figure}"
    shell:
        run_script("tabulate_hyperparameters")

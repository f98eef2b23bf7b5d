"""Tables beside those of accuracy: time and memory (Table 7), cost, hyperparameters (Table 6)."""

# ---- efficiency ------------------------------------------------------------------------------


rule measure_efficiency:
    input:
        unpack(measure_efficiency_input),
    output:
        measured=MEASUREMENT,
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
        **params_of("measure_efficiency"),
    message:
        "Time and memory of table {wildcards.figure}, alone on the machine"
    shell:
        run_script("measure_efficiency")


rule tabulate_efficiency:
    input:
        measured=MEASUREMENT,
    output:
        **table_files("{figure}", "figure.rst"),
    log:
        log_of("tabulate_efficiency", "{figure}"),
    benchmark:
        benchmark_of("tabulate_efficiency", "{figure}")
    wildcard_constraints:
        figure=figures_of_kind("efficiency"),
    conda:
        "../envs/wmdd.yaml"
    params:
        **params_of("tabulate_efficiency"),
    message:
        "Table {wildcards.figure}"
    shell:
        run_script("tabulate_efficiency")


# ---- cost ------------------------------------------------------------------------------------


rule tabulate_cost:
    input:
        unpack(tabulate_cost_input),
    output:
        **table_files("{figure}", "figure.rst"),
    log:
        log_of("tabulate_cost", "{figure}"),
    benchmark:
        benchmark_of("tabulate_cost", "{figure}")
    wildcard_constraints:
        figure=figures_of_kind("cost"),
    conda:
        "../envs/wmdd.yaml"
    params:
        **params_of("tabulate_cost"),
    message:
        "Table {wildcards.figure}"
    shell:
        run_script("tabulate_cost")


# ---- hyperparameters -------------------------------------------------------------------------


rule tabulate_hyperparameters:
    output:
        **table_files("{figure}", "figure.rst"),
    log:
        log_of("tabulate_hyperparameters", "{figure}"),
    benchmark:
        benchmark_of("tabulate_hyperparameters", "{figure}")
    wildcard_constraints:
        figure=figures_of_kind("hyperparameters"),
    conda:
        "../envs/wmdd.yaml"
    params:
        **params_of("tabulate_hyperparameters"),
    message:
        "Table {wildcards.figure}"
    shell:
        run_script("tabulate_hyperparameters")

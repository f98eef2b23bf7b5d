"""Tables, figures and the page: everything is drawn from artefacts, and from nothing else."""

# ---- accuracy tables -------------------------------------------------------------------------


rule tabulate_accuracy:
    input:
        evaluations=lambda w: evaluations(table_cells(w.table)),
    output:
        **table_files("{table}", "table.rst"),
    log:
        log_of("tabulate_accuracy", "{table}"),
    benchmark:
        benchmark_of("tabulate_accuracy", "{table}")
    conda:
        "../envs/wmdd.yaml"
    params:
        **params_of("tabulate_accuracy"),
    message:
        "Table {wildcards.table}"
    shell:
        run_script("tabulate_accuracy")


# ---- figures ---------------------------------------------------------------------------------


rule plot_accuracy:
    input:
        table=lambda w: table_csv(figure_of(w)["table"]),
    output:
        **figure_files(),
    log:
        log_of("plot_accuracy", "{figure}"),
    benchmark:
        benchmark_of("plot_accuracy", "{figure}")
    wildcard_constraints:
        figure=figures_of_kind("accuracy"),
    conda:
        "../envs/wmdd.yaml"
    params:
        **params_of("plot_accuracy"),
    message:
        "Figure {wildcards.figure}"
    shell:
        run_script("plot_accuracy")


rule plot_sweep:
    input:
        table=lambda w: table_csv(figure_of(w)["table"]),
    output:
        **figure_files(),
    log:
        log_of("plot_sweep", "{figure}"),
    benchmark:
        benchmark_of("plot_sweep", "{figure}")
    wildcard_constraints:
        figure=figures_of_kind("sweep"),
    conda:
        "../envs/wmdd.yaml"
    params:
        **params_of("plot_sweep"),
    message:
        "Figure {wildcards.figure}"
    shell:
        run_script("plot_sweep")


rule plot_gallery:
    input:
        unpack(gallery_input),
    output:
        **figure_files(),
    log:
        log_of("plot_gallery", "{figure}"),
    benchmark:
        benchmark_of("plot_gallery", "{figure}")
    wildcard_constraints:
        figure=figures_of_kind("gallery"),
    conda:
        "../envs/wmdd.yaml"
    params:
        **params_of("plot_gallery"),
    message:
        "Figure {wildcards.figure}"
    shell:
        run_script("plot_gallery")


# ---- the page --------------------------------------------------------------------------------


rule build_page:
    input:
        unpack(page_input),
    output:
        page=report(PAGE, category="Page", caption="../report/page.rst"),
    log:
        log_of("build_page", "{page}"),
    benchmark:
        benchmark_of("build_page", "{page}")
    conda:
        "../envs/wmdd.yaml"
    params:
        **params_of("build_page"),
    message:
        "Page {output.page}"
    shell:
        run_script("build_page")


# `snakemake main`, `snakemake gallery`: each table and figure has a target of its own name.


for _name in [*config["tables"], *config["figures"]]:

    rule:
        name:
            _name
        input:
            target_files([_name]),


rule all_paper:
    input:
        PAGE.format(page="paper"),
        lambda w: target_files(page_names("paper")),

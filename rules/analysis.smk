"""Figures of the appendices: distances, t-SNE maps, the barycenter's convergence.

What takes networks is measured by a rule and drawn by another, so that a label costs a drawing.
"""

# ---- distances -------------------------------------------------------------------------------


rule measure_distances:
    input:
        unpack(measure_distances_input),
    output:
        csv=f"{FIGURE}.csv",
    log:
        log_of("measure_distances", "{figure}"),
    benchmark:
        benchmark_of("measure_distances", "{figure}")
    wildcard_constraints:
        figure=figures_of_kind("distances"),
    conda:
        "../envs/wmdd.yaml"
    resources:
        local_gpu=local_gpu,
    params:
        **params_of("measure_distances"),
    message:
        "Distances of figure {wildcards.figure}"
    shell:
        run_script("measure_distances")


rule plot_distances:
    input:
        csv=f"{FIGURE}.csv",
    output:
        **drawing_files(),
    log:
        log_of("plot_distances", "{figure}"),
    benchmark:
        benchmark_of("plot_distances", "{figure}")
    wildcard_constraints:
        figure=figures_of_kind("distances"),
    conda:
        "../envs/wmdd.yaml"
    params:
        **params_of("plot_distances"),
    message:
        "Figure {wildcards.figure}"
    shell:
        run_script("plot_distances")


# ---- t-SNE -----------------------------------------------------------------------------------


rule embed_tsne:
    input:
        unpack(embed_tsne_input),
    output:
        csv=f"{FIGURE}.csv",
        points=f"{FIGURE}.points.csv",
    log:
        log_of("embed_tsne", "{figure}"),
    benchmark:
        benchmark_of("embed_tsne", "{figure}")
    wildcard_constraints:
        figure=figures_of_kind("tsne"),
    conda:
        "../envs/wmdd.yaml"
    resources:
        local_gpu=local_gpu,
    params:
        **params_of("embed_tsne"),
    message:
        "Maps of figure {wildcards.figure}"
    shell:
        run_script("embed_tsne")


rule plot_tsne:
    input:
        points=f"{FIGURE}.points.csv",
        description=lambda w: DESCRIPTION.format(dataset=single(w, "datasets")),
    output:
        **drawing_files(),
    log:
        log_of("plot_tsne", "{figure}"),
    benchmark:
        benchmark_of("plot_tsne", "{figure}")
    wildcard_constraints:
        figure=figures_of_kind("tsne"),
    conda:
        "../envs/wmdd.yaml"
    params:
        **params_of("plot_tsne"),
    message:
        "Figure {wildcards.figure}"
    shell:
        run_script("plot_tsne")


# ---- convergence -----------------------------------------------------------------------------


rule trace_barycenters:
    input:
        unpack(trace_barycenters_input),
    output:
        **figure_files(),
    log:
        log_of("trace_barycenters", "{figure}"),
    benchmark:
        benchmark_of("trace_barycenters", "{figure}")
    wildcard_constraints:
        figure=figures_of_kind("barycenter_iterations"),
    conda:
        "../envs/wmdd.yaml"
    params:
        **params_of("trace_barycenters"),
    message:
        "Figure {wildcards.figure}"
    shell:
        run_script("trace_barycenters")

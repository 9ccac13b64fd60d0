"""Which tests `make test-fast` leaves out besides those that are marked ``slow`` themselves: whole groups of them."""

from __future__ import annotations

from tests.support.selection import reason_of

# Pattern of a test's name (selection.py): reason. Seconds are those of a processor's core.
SLOW = {
    "*::*[emulated]": "the GPU's kernels in the emulator, up to 14 s a test; test_emulation*.py have calls of each",
    "test_emulation_conv1x1.py::test_forward_with_several_tiles_in_a_block": "the emulator again, 1 s a test",
    "test_emulation_conv1x1.py::test_backward_with_several_tiles_in_a_block": "the same",
    "test_emulation_conv1x1.py::test_forward_of_whole_networks": "the same",
    "test_emulation_conv1x1.py::test_backward_of_whole_networks": "the same",
    "test_emulation_conv3x3.py::test_forward_with_several_tiles_in_a_block": "the same",
    "test_emulation_conv3x3.py::test_backward_with_several_tiles_in_a_block": "the same",
    "test_emulation_conv3x3.py::test_backward": "the same; test_backward_cases has a call of each kind",
    "test_emulation_conv3x3.py::test_forward_of_whole_networks": "the same",
    "test_emulation_conv3x3.py::test_forward_of_wide_channels": "the same",
    "test_emulation_conv3x3.py::test_backward_of_whole_networks": "the same",
    "test_emulation_conv3x3.py::test_backward_of_wide_channels": "the same",
    "test_emulation_operators.py::test_every_form_of_the_3x3_convolution": "the same",
    "test_kernels.py::*[avx2]": "the widest SIMD level and the portable one show most",
    "test_conv3x3.py::*[avx2]": "the same",
    "test_winograd.py::*[avx2]": "the same",
    "test_block_threads.py::test_a_pool_of_fewer_threads_than_were_asked_for": "a process of its own, 4 s",
    "test_depth_benchmark.py": "starts a process for each depth, 3 s each",
    "tests/training/test_train_resume.py": "kills and resumes runs, 35 s in all",
    "tests/compare/test_train_compare.py": "trains in both forms, 35 s in all",
    "test_train_images.py::test_a_densenet_121_for_large_images": "trains on large images, 2 s",
    "test_train_images.py::test_networks_of_timm_train_on_folders": "the same, 2 s",
    "test_train.py::test_a_full_disk_ends_the_run_and_leaves_the_last_good_checkpoint": "trains several times, 3 s",
    "test_train.py::test_without_out_runs_are_repeatable_in_new_folders_and_the_seed_matters": "the same, 2 s",
    "test_train.py::test_a_run_without_a_checkpoint_begins_again": "the same",
    "test_train.py::test_fused_and_unfused_runs_agree_up_to_rounding": "the same",
    "test_train.py::test_a_missing_library_is_named": "imports all in a process of its own, 4 s",
    "test_train.py::test_python_m_runs_the_command_line": "the same, 3 s",
    "test_train_data.py::test_the_missing_operators_of_torchvision_are_declared": "the same, twice",
    "test_train_loading.py::test_other_ways_to_start_workers": "the same in the workers",
    "test_train_pictures.py::test_settings_of_the_user_are_neither_used_nor_changed": "the same",
    "tests/distributed/test_distributed.py": "starts processes, which compile: 30 s for each kind of parallelism",
    "tests/peers/test_*.py": "other people's tools on fused networks: no one of them is slow, but they are many",
    "tests/algorithm/test_compile.py": "torch.compile of every unit, a second or more for each graph",
    "tests/fusing/test_fuse_compile.py": "torch.compile of whole networks",
    "test_fuse_captures.py::test_compile_without_graph_breaks": "the same, 2 s each",
    "test_fc_densenet.py::test_compiles_exports_and_takes_any_layout": "the same, 4 s",
    "test_fuse_generic.py::test_compiles_without_graph_break": "the same, 5 s a style",
    "test_fuse_transition.py::test_compiles_without_graph_break": "the same",
    "test_matrix.py::test_compile": "the same, 3 s each",
    "test_matrix.py::test_batch_sizes": "torch.compile of every library's network, 3 to 8 s each",
    "test_docs_cuda.py::test_the_page_with_a_stand_in": "runs a page, 7 s",
    "test_docs.py::test_code": "runs the pages, 80 s in all",
    "test_docs.py::test_code_under_torchrun": "runs pages in two processes",
    "test_docs.py::test_what_is_served_needs_nothing_of_ours": "exports and loads a network in a process of its own",
    "test_plan.py::test_wrapped_and_altered_models": "plans many models, 2 s",
    "test_gpu_tool.py::test_the_suite_is_whole_and_begins_with_what_shows_most": "starts pytest, 5 s",
    "test_gpu_tool.py::test_the_sanitizer_runs_three_tools": "calls every operator in a process of its own, 4 s",
    "test_gpu_tool.py::test_a_hidden_gpu_is_one_sentence": "the same of one that says it, 4 s",
    "test_packaging.py::test_a_compiled_part_that_does_not_load_warns_once": "two processes of their own, 7 s",
    "test_site.py": "builds the site three times",
}


def reason_to_wait(nodeid: str) -> str | None:
    """Returns why the test ``nodeid`` is not among the fast ones, or None when it may be."""
    return reason_of(nodeid, SLOW)

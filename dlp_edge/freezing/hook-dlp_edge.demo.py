"""The demo's adapters, router, prompts and chat template."""

from PyInstaller.utils.hooks import collect_data_files

datas = collect_data_files("dlp_edge.demo")

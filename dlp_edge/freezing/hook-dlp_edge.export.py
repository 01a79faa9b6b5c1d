"""The text that an export measures perplexity on."""

from PyInstaller.utils.hooks import collect_data_files

datas = collect_data_files("dlp_edge.export")

"""The files of the chat page."""

from PyInstaller.utils.hooks import collect_data_files

datas = collect_data_files("dlp_edge.server")

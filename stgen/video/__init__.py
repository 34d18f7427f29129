"""Clips on disk: reading, writing and measuring videos, and sheets of stills. The only package that imports av.

A video is a regular local file (mp4, mkv, webm, avi, mov, m4v, gif), such a file inside a tar, or a folder that holds
nothing but numbered images; an image file is a video of one frame. Pixels are sRGB bytes; a clip is uint8 [T, 3, H, W].
"""

from stgen.video.clip import Clip as Clip
from stgen.video.clip import Info as Info
from stgen.video.clip import VideoError as VideoError
from stgen.video.clip import offsets as offsets
from stgen.video.files import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from stgen.video.files import OTHER_SUFFIXES as OTHER_SUFFIXES
from stgen.video.files import SUFFIXES as SUFFIXES
from stgen.video.files import is_image as is_image
from stgen.video.reading import probe as probe
from stgen.video.reading import read as read
from stgen.video.sheets import contact_sheet as contact_sheet
from stgen.video.stills import FOLDER_FPS as FOLDER_FPS
from stgen.video.stills import frame_files as frame_files
from stgen.video.writing import write as write
from stgen.video.writing import writer as writer

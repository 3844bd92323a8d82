"""All that a run can be trained on."""

from mezzotint.data.folder import FolderConfig
from mezzotint.data.mixture import MixtureConfig
from mezzotint.data.pairs import PairsConfig
from mezzotint.data.preferences import PreferencesConfig
from mezzotint.data.rows import TableConfig
from mezzotint.data.worlds import WorldsConfig

DataConfig = WorldsConfig | FolderConfig | PreferencesConfig | PairsConfig | TableConfig | MixtureConfig

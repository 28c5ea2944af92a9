"""Image files as a TFDS dataset that is read where they lie.

TFDS copies what a dataset downloads into files of its own. For images that are
already on disk, by the million, this builder reads the originals instead.
"""

import pathlib

import numpy as np
import tensorflow_datasets as tfds

with tfds.core.registered.skip_registration():

  class InPlaceBuilder(tfds.core.DatasetBuilder):
    """A TFDS builder of images in archives: folders, zips, LMDBs."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, name, path, splits, labels=(None, None), **info):
      """Makes the builder.

      Args:
        name: of the dataset.
        path: where the files are.
        splits: {name: (archive, indices [N])}; see `archives.open_archive`.
        labels: the class names, and the class of each image of each archive;
          or two Nones.
        **info: of tfds.core.DatasetInfo: description, license.
      """
      self.name = name
      self._splits = splits
      self._class_names, self._labels = labels
      self._info_fields = info
      super().__init__()
      # as_dataset() asks whether it is there.
      self._data_dir = str(pathlib.Path(path).expanduser())
      self.info.set_splits(
        tfds.core.SplitDict(
          [
            tfds.core.SplitInfo(
              name=split, shard_lengths=[len(indices)], num_bytes=0
            )
            for split, (_, indices) in splits.items()
          ]
        )
      )

    def _info(self):
      features = {"image": tfds.features.Image()}
      if self._labels is not None:
        features["label"] = tfds.features.ClassLabel(names=self._class_names)
      return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict(features),
        **self._info_fields,
      )

    def _download_and_prepare(self, **unused_options):
      """Does nothing: the files are there."""

    def download_and_prepare(self, **unused_options):
      """Does nothing: the files are there."""

    def _as_dataset(
      self, split, shuffle_files=False, decoders=None, read_config=None
    ):
      import tensorflow as tf

      datasets = []
      instructions = tfds.core.ReadInstruction.from_spec(split)
      for part in instructions.to_absolute(self.info.splits):
        archive, indices = self._splits[part.splitname]
        indices = indices[part.from_ : part.to]
        datasets.append(
          tf.data.Dataset.from_tensor_slices(np.asarray(indices))
          .batch(64)  # a call of Python costs more than to read an image
          .map(lambda batch, archive=archive: self._examples(archive, batch))
          .unbatch()
        )
      dataset = datasets[0]
      for other in datasets[1:]:
        dataset = dataset.concatenate(other)
      ids = read_config is not None and read_config.add_tfds_id
      if isinstance(decoders, tfds.decode.PartialDecoding):
        decoders = decoders.decoders  # there is little to leave out

      def decode(name, example):
        example = self.info.features.decode_example(example, decoders=decoders)
        return {**example, "tfds_id": name} if ids else example

      return dataset.map(decode)

    def _examples(self, archive, indices):
      """Returns the names and the encoded features of images."""
      import tensorflow as tf

      def read(indices):
        names = [archive.names[i] for i in indices]
        images = [archive.read(i) for i in indices]
        return np.array(names, np.object_), np.array(images, np.object_)

      names, images = tf.numpy_function(
        read, [indices], (tf.string, tf.string), stateful=False
      )
      names.set_shape((None,))
      images.set_shape((None,))
      examples = {"image": images}
      if self._labels is not None:
        examples["label"] = tf.gather(self._labels.astype(np.int64), indices)
      return names, examples

"""The original notebook's sections 4 to 6 (and 7's reshape), word for word and slow.

A reference for the tests, independent of the package: it imports nothing of vitxr.
Function names, order of arguments, loops, in-place writes and returned tuples are the
notebook's. It departs from the text only where the text cannot run; each such place
is marked ``DIFFERS`` with the reason. The notebook's prints and figures are left out.
"""

# ruff: noqa: A002, B007, B023, F841, RET504, RUF046, RUF059, SIM108
# The notebook's habits are kept on purpose.

import math

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat

# --- section 4: images ---------------------------------------------------------------


def get_images_selected_classes(num_images, n_classes, img_arrays, MAX_SIZE=224):
    """``img_arrays``: one array (#images, #nrow, #ncol, #channels), 0..255, per class.

    Returns (#images, #nrow, #ncol, #channels), class after class.
    """
    # DIFFERS: the text repeats the loop for four global arrays (starfish, strawberry, husky,
    # guitar) with MAX_SIZE = 224; here the arrays and the size are arguments.
    assert len(img_arrays) == n_classes
    images_selected_classes = []
    for img_array in img_arrays:
        for i in range(int(num_images / n_classes)):
            im = Image.fromarray(img_array[i, :, :, :].astype(np.uint8))
            # DIFFERS: Image.ANTIALIAS was an alias of LANCZOS and is gone from Pillow.
            im.thumbnail((MAX_SIZE, MAX_SIZE), Image.LANCZOS)
            images_selected_classes.append(np.array(im))
    ## (#images, #nrow, #ncol, #channels)
    images_selected_classes = np.array(images_selected_classes)
    return images_selected_classes


def channels_first(images_selected_classes):
    """The line after the call, so that the images are as the model takes them."""
    return images_selected_classes.transpose((0, 3, 1, 2))


# --- section 5: 3D neuron tensor -----------------------------------------------------


def apply_all_shifts(im, shift_step):
    """All shifts of one image (3, rows, cols), and the ``n_shifts`` the notebook returns.

    ``n_shifts`` is vertical times horizontal; the frames are one more for each vertical
    shift, because the image is kept after the vertical roll as well.
    """
    im_size_vertical = im.shape[1]
    im_size_horizontal = im.shape[2]
    n_shifts_vertical = int(math.ceil(im_size_vertical / shift_step))
    n_shifts_horizontal = int(math.ceil(im_size_horizontal / shift_step))
    n_shifts = n_shifts_vertical * n_shifts_horizontal
    im_all_shifts = []
    # start with the unshifted im
    im_shift = im
    # im_all_shifts.append(np.expand_dims(im_shift,axis=0))
    for i in range(n_shifts_vertical):
        ## for pytorch axis = 1, for tensorflow axis = 0
        im_shift = np.roll(im_shift, shift=shift_step, axis=1)
        im_all_shifts.append(np.expand_dims(im_shift, axis=0))
        for j in range(n_shifts_horizontal):
            ## for pytorch axis = 2, for tensorflow axis = 1
            im_shift = np.roll(im_shift, shift=shift_step, axis=2)
            im_all_shifts.append(np.expand_dims(im_shift, axis=0))
    im_all_shifts = np.vstack(im_all_shifts)
    # DIFFERS: torch.cuda.FloatTensor needs a GPU.
    im_all_shifts = torch.FloatTensor(im_all_shifts)
    return im_all_shifts, n_shifts


def compute_neuron_output(
    model,
    layer_index,
    im_all_shifts,
    max_indices=None,
    n_max_feature_maps=500,
    plot_activity=False,
):
    """Neurons of the kept feature maps in every frame of ``im_all_shifts``.

    Returns ``neuron_output_highest`` (n_shifts, n_max_feature_maps * n_neurons), ``fm_avg``
    (n_shifts, n_features; of the kept maps, normalised, where ``plot_activity``),
    ``neuron_labels``, ``max_indices``, ``n_neurons``.
    """
    n_shifts = im_all_shifts.shape[0]
    neuron_output_highest = []
    im_all_shifts = torch.FloatTensor(im_all_shifts)  # DIFFERS: cpu, as above
    # DIFFERS: model.vit.encoder.layer[layer_index].output in the text. That module ended the block
    # and added the residual, so its output was the block's; newer transformers keep the blocks
    # in model.vit.layers and return the same tensor from the block itself.
    layer = model.vit.layers[layer_index]
    neuron_output = []
    # go through all the batches in the dataset
    for i in range(n_shifts):
        # forward pass -- getting the outputs
        im = im_all_shifts[i]
        activation = {}

        def get_activation(name):
            def hook(model, input, output):
                activation[name] = output.detach()
                handle.remove()

            return hook

        # register the forward hook
        handle = layer.register_forward_hook(get_activation("encoder_queried_layer"))
        # pass some data through the model
        output = model(im.unsqueeze(dim=0))
        ## shape (1, n_patches + 1 cls token = 197, n_out_features)
        layer_out = activation["encoder_queried_layer"]
        handle.remove()
        relu = torch.nn.ReLU()
        layer_out = relu(layer_out)
        layer_out = layer_out.cpu().data
        layer_out = layer_out[:, 1:, :]
        neuron_output.append(layer_out)
    neuron_output = np.vstack(neuron_output)
    n_shifts, n_neurons, n_features = neuron_output.shape
    ## transpose to organize by feature maps
    ## the shape of neuron_output_by_fm is (n_shifts, n_feature_maps, #neurons)
    neuron_output_by_fm = neuron_output.transpose(0, 2, 1)
    ## compute avg neuron firing rate in each feature map
    ## fm_avg is of shape (n_shifts, n_feature_maps)
    fm_avg = neuron_output_by_fm.sum(axis=2) / neuron_output_by_fm.shape[2]
    neuron_output_highest = np.empty((n_shifts, n_max_feature_maps * n_neurons))
    # DIFFERS: the text slices by feature_map_side ** 2 with feature_map_side =
    # int(np.sqrt(n_neurons)), which is n_neurons on a square grid and wrong on any other.
    for i in range(n_shifts):
        if max_indices is None:
            max_indices = np.argsort(-1 * fm_avg[i], axis=0)[:n_max_feature_maps]
        temp = neuron_output_by_fm[i, max_indices, :]
        neuron_output_highest[i] = neuron_output_by_fm[i, max_indices, :].reshape(
            (1, n_max_feature_maps * n_neurons)
        )
        for f_i in range(n_max_feature_maps):
            normalizing_constant = temp[f_i, :].max()
            if normalizing_constant == 0:
                neuron_output_highest[i, (f_i * n_neurons) : ((f_i + 1) * n_neurons)] = 0
            else:
                neuron_output_highest[i, (f_i * n_neurons) : ((f_i + 1) * n_neurons)] /= (
                    normalizing_constant
                )
    if plot_activity:
        neuron_output_highest_by_fm = neuron_output_highest.reshape(
            (n_shifts, n_max_feature_maps, n_neurons)
        )
        fm_avg = neuron_output_highest_by_fm.sum(axis=2) / neuron_output_highest_by_fm.shape[2]
    neuron_labels = []
    for i in range(n_max_feature_maps):
        neuron_labels += [i] * n_neurons
    neuron_labels = np.array(neuron_labels)
    return neuron_output_highest, fm_avg, neuron_labels, max_indices, n_neurons


def show_stimuli_3D(
    model,
    layer_index,
    images_selected_classes,
    shifts,
    max_indices,
    n_images_selected_classes=20,
    shift_step=11,
    n_max_feature_maps=500,
    plot_activity=False,
):
    """The same maps' neurons for every image and frame.

    Returns (n_images, n_frames, n_max_feature_maps * n_neurons), ``fm_avg`` of the last
    image, ``neuron_labels``, ``max_indices``. Without shifts ``n_frames`` is 1.
    """
    if shifts is False:
        neuron_output_highest_without_shifts = []
        for i in range(n_images_selected_classes):
            im = np.expand_dims(images_selected_classes[i], axis=0)
            ## neuron_output_highest is of shape (n_shifts = 1, n_neurons * n_max_feature_maps)
            # DIFFERS: the text expands im a second time in this call, which would feed the model
            # a 5-D tensor and raise. Its comment says what is meant: one frame an image.
            neuron_output_highest, fm_avg, neuron_labels, max_indices, n_neurons = (
                compute_neuron_output(
                    model, layer_index, im, max_indices, n_max_feature_maps, plot_activity
                )
            )
            neuron_output_highest_without_shifts.append(neuron_output_highest)
        neuron_output_highest_without_shifts = np.array(neuron_output_highest_without_shifts)
        neuron_output_highest_final = neuron_output_highest_without_shifts
    else:
        # generate shifts for each selected image and then stack:
        neuron_output_highest_with_shifts = []
        for i in range(n_images_selected_classes):
            im = images_selected_classes[i]
            im_all_shifts, n_shifts = apply_all_shifts(im, shift_step)
            ## neuron_output_highest is of shape (n_shifts, n_neurons * n_max_feature_maps)
            neuron_output_highest, fm_avg, neuron_labels, max_indices, n_neurons = (
                compute_neuron_output(
                    model,
                    layer_index,
                    im_all_shifts,
                    max_indices,
                    n_max_feature_maps,
                    plot_activity,
                )
            )
            ## instead of taking average, we create a dimension for all shifts
            neuron_output_highest_with_shifts.append(neuron_output_highest)
        ## out of for loop!
        ## (n_images_selected_classes, n_shifts, n_neurons * n_max_feature_maps)
        neuron_output_highest_with_shifts = np.array(neuron_output_highest_with_shifts)
        neuron_output_highest_final = neuron_output_highest_with_shifts
    return neuron_output_highest_final, fm_avg, neuron_labels, max_indices


def neuron_output_3D(neuron_output_highest_with_shifts, path=None):
    """The array exported to MATLAB, (neuron, image, frame), and the file where ``path``."""
    data = np.transpose(neuron_output_highest_with_shifts, (2, 0, 1))
    mdic = {"neuron_output_3D": data}
    if path is not None:
        savemat(path, mdic)
    return data


# --- section 6: 2D neuron tensor -----------------------------------------------------


def show_stimuli_2D(
    model,
    layer_index,
    images_selected_classes,
    shifts,
    max_indices,
    n_images_selected_classes,
    shift_step=11,
    n_max_feature_maps=5,
    plot_activity=False,
):
    """The same maps' neurons for every image, averaged over its shifts.

    Returns (n_images, n_max_feature_maps * n_neurons), ``fm_avg_all_layers`` (n_images,
    n_features), ``neuron_labels``, ``max_indices``. Without shifts the images take the
    place of frames, all of them whatever ``n_images_selected_classes`` says.
    """
    if shifts is False:
        neuron_output_highest_final, fm_avg_all_layers, neuron_labels, max_indices, n_neurons = (
            compute_neuron_output(
                model,
                layer_index,
                images_selected_classes,
                max_indices,
                n_max_feature_maps,
                plot_activity,
            )
        )
    else:
        # generate shifts for each selected image and then stack:
        neuron_output_highest_with_shifts = []
        for i in range(n_images_selected_classes):
            im = images_selected_classes[i]
            im_all_shifts, n_shifts = apply_all_shifts(im, shift_step)
            ## neuron_output_highest is of shape (n_shifts, n_neurons * n_max_feature_maps)
            neuron_output_highest, fm_avg_all_layers, neuron_labels, max_indices, n_neurons = (
                compute_neuron_output(
                    model,
                    layer_index,
                    im_all_shifts,
                    max_indices,
                    n_max_feature_maps,
                    plot_activity,
                )
            )
            ## take the average over all shifts of im
            neuron_output_highest_shifts_avg = (
                neuron_output_highest.sum(axis=0) / neuron_output_highest.shape[0]
            )
            neuron_output_highest_shifts_avg = neuron_output_highest_shifts_avg.reshape(
                (1, neuron_output_highest_shifts_avg.shape[0])
            )
            fm_shifts_avg = fm_avg_all_layers.sum(axis=0) / fm_avg_all_layers.shape[0]
            fm_shifts_avg = fm_shifts_avg.reshape((1, fm_shifts_avg.shape[0]))
            if i == 0:
                neuron_output_highest_with_shifts = neuron_output_highest_shifts_avg
                fm_avg_all_layers_with_shifts = fm_shifts_avg
            else:
                neuron_output_highest_with_shifts = np.vstack(
                    (neuron_output_highest_with_shifts, neuron_output_highest_shifts_avg)
                )
                fm_avg_all_layers_with_shifts = np.vstack(
                    (fm_avg_all_layers_with_shifts, fm_shifts_avg)
                )
        ## out of for loop!
        ## (n_images_selected_classes, n_neurons * n_max_feature_maps)
        neuron_output_highest_with_shifts = np.array(neuron_output_highest_with_shifts)
        neuron_output_highest_final = neuron_output_highest_with_shifts
        fm_avg_all_layers = fm_avg_all_layers_with_shifts
    return neuron_output_highest_final, fm_avg_all_layers, neuron_labels, max_indices


def neuron_output_2D(neuron_output_highest_with_shifts, path=None):
    """The array exported to MATLAB, (neuron, image), and the file where ``path``."""
    data = np.transpose(neuron_output_highest_with_shifts, (1, 0))
    mdic = {"neuron_output_2D": data}
    if path is not None:
        savemat(path, mdic)
    return data


# --- section 7: what the factorization is given --------------------------------------


def tensor_to_factorize(N, dim=3):
    """``N_filtered`` of get_tensor_factors: a 2D tensor gets a third mode of length 1."""
    # DIFFERS: the first lines of get_tensor_factors only; the Gaussian filter is commented out
    # in the text, and the fit itself is tensortools'.
    if dim == 3:
        N_filtered = N
    else:
        N_filtered = N.reshape((N.shape[0], N.shape[1], 1))
    return N_filtered


def ncp_hals(X, start, tol=1e-5, max_iter=500):
    """The fit that get_tensor_factors calls, tensortools' ``ncp_hals``, from a given start.

    Returns the factors and the objectives, one after each iteration.
    """
    U = [np.array(f, X.dtype) for f in start]
    rank = U[0].shape[1]
    normX = np.linalg.norm(X)
    obj_hist = []
    # DIFFERS: tensortools makes one iteration more than it is asked for.
    while len(obj_hist) < max_iter:
        for n in range(X.ndim):
            components = [U[j] for j in range(X.ndim) if j != n]
            grams = np.prod([arr.T @ arr for arr in components], axis=0)
            # DIFFERS: tensortools has einsum multiply all components at a time.
            kr = components[0]
            for arr in components[1:]:
                kr = (kr[:, None] * arr).reshape(-1, rank)
            Xmkr = np.moveaxis(X, n, 0).reshape(X.shape[n], -1).dot(kr)
            factors = U[n]
            if rank == 1:
                factors[:] = np.maximum(0.0, Xmkr / grams[0, 0])
                continue
            for itr in range(3):
                for p in range(rank):
                    idx = np.arange(rank) != p
                    # DIFFERS: factors[:, idx] @ grams[idx][:, p] there, compiled by numba.
                    Cp = factors @ np.where(idx, grams[:, p], 0)
                    r = (Xmkr[:, p] - Cp) / np.maximum(grams[p, p], 1e-6)
                    factors[:, p] = np.maximum(r, 0.0)
        grams *= U[n].T @ U[n]
        residsq = np.sum(grams) - 2 * np.sum(U[n] * Xmkr) + (normX**2)
        obj_hist.append(np.sqrt(residsq) / normX)
        if len(obj_hist) > 1 and obj_hist[-2] - obj_hist[-1] < tol:
            break
    return U, np.array(obj_hist)
